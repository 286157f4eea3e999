"""The command line: `python -m jaxbn`."""
