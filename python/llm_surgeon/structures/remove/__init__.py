"""What is zero, taken out of a model."""
