"""What wins quality back."""
