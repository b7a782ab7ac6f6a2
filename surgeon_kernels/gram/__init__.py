"""Sums of outer products, stored as triangles."""
