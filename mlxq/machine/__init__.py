"""What machines are, and what fits on them."""
