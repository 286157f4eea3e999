"""Changes to a trained model or to its statistics. No file here imports another."""
