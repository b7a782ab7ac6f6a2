"""Kronecker-factored curvature of every linear layer: estimated in hooked passes, damped and inverted."""
