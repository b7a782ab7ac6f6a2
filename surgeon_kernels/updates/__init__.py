"""Updates by which the kept weights compensate for the pruned ones."""
