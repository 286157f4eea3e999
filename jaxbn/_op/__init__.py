"""One batch norm: what `jaxbn.batch_norm` computes and how; README.md has the order to read."""
