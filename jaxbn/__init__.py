"""Batch normalization for JAX and Flax."""
