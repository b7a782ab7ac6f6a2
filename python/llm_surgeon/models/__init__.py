"""A causal LM as pruning sees it: its decoder, passes through it, its state, its size."""
