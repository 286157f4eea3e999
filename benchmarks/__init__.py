"""What the library claims, measured: `python -m benchmarks --help`."""
