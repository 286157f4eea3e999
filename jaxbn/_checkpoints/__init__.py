"""Files of arrays: read as data, written whole, and the norm layers in them."""
