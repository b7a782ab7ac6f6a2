"""Text, conversations and token ids, and the calibration windows made of them."""
