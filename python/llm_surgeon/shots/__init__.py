"""Pruning in several shots: estimate, select, update, again."""
