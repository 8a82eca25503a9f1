"""Every decision and every byte, before a weight is read."""
