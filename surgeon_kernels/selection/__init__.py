"""Costs of removing weights, and the cheapest of them."""
