"""Formats on disk: headers of safetensors files, packed 2:4 weights, and the code inside pruned checkpoints."""
