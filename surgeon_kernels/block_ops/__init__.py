"""Pointwise parts of decoder blocks, each as one kernel."""
