"""A checkpoint in, a checkpoint out: check, load, work, save."""
