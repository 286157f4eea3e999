"""A trained model or its statistics, changed. No file here imports another."""
