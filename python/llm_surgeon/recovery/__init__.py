"""Recovery: training of what pruning left, which keeps every zero a zero."""
