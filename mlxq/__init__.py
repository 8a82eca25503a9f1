"""mlxq: convert and quantize language models for Apple's MLX."""

__version__ = "0.1.0"
