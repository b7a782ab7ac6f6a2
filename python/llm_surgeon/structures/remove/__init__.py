"""Removal, for good, of what is zero in a model."""
