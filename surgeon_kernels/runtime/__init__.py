"""Building, defining, checking and launching of ops."""
