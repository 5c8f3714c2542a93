"""What makes a whole model fast without changing what it computes."""
