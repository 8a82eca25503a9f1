"""Formats weights are stored in, and algorithms that encode them."""
