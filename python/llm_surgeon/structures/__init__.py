"""Coupled structures: neurons, heads, the residual width and whole blocks, found by probing and removed for good."""
