"""What ops are built, checked, loaded and launched with."""
