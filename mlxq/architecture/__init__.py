"""From checkpoint names to MLX modules."""
