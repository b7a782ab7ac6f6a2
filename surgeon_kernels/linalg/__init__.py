"""Products, factorisations and solves."""
