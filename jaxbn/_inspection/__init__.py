"""Inside a Flax model, without changing it: where its norm layers are, and what they see."""
