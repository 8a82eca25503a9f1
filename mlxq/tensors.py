"""Tensors as headers describe them: a name, a dtype in safetensors spelling, a shape."""

from __future__ import annotations

import math
import re
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


# Units of sizes that people write: powers of ten, and of two with an i.
BYTE_UNITS: dict[str, int] = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str) -> int | None:
    """Bytes of a size such as ``2.2GB`` or ``900 MiB``; None where it is none."""
    # Digits enough for any size, and few enough for every product to be a number.
    found = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2].upper() not in BYTE_UNITS:
        return None
    return round(float(found[1]) * BYTE_UNITS[found[2].upper()])


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
