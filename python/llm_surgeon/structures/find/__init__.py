"""Coupled dimensions of a model, found by probing it."""
