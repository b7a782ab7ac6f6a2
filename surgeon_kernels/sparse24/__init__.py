"""2:4 weights, packed, and products with them."""
