"""Tensors as headers describe them: a name, a dtype in safetensors spelling, a shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Safetensors dtype names and their size in bits (format specification, safetensors 0.5).
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}

# The floating dtypes MLX computes in, by their safetensors names and by the names recipes use.
FLOAT_DTYPES: dict[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
DTYPE_BY_NAME: dict[str, str] = {name: code for code, name in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: ``dtype`` in safetensors spelling (``"BF16"``), ``shape`` outermost first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.size * DTYPE_BITS[self.dtype] // 8

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix of its last axis; 1 for vectors and scalars."""
        return math.prod(self.shape[:-1])
