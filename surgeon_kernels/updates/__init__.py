"""How surviving weights make up for those that are removed."""
