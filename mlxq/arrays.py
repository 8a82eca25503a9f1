"""Between numpy and MLX: BF16, which numpy has no name for, goes as its 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy.typing as npt


def to_mlx(rows: Any, dtype: str) -> mx.array:
    """A numpy block as an MLX array of the stored dtype (BF16 comes as its 16 bits)."""
    import mlx.core as mx

    array = mx.array(rows)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def as_bytes(array: mx.array) -> memoryview:
    """The bytes of an array, row-major, without a copy where it is contiguous already."""
    import mlx.core as mx
    import numpy as np

    flat = mx.contiguous(array).reshape(-1)
    if flat.dtype == mx.bfloat16:
        flat = flat.view(mx.uint16)
    mx.eval(flat)
    return np.asarray(flat).data.cast("B")


def as_matrix(array: mx.array) -> npt.NDArray[Any]:
    """An array as a numpy matrix of its rows; a scalar is one row of one."""
    import mlx.core as mx
    import numpy as np

    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.asarray(plain.reshape(-1, array.shape[-1] if array.ndim else 1))


def all_finite(array: mx.array) -> mx.array:
    """Whether no number of a float array is NaN or infinite, as a scalar yet to be evaluated.

    Such a number has every bit of its exponent set, so that read as an integer none of its sign is larger: signed
    integers show those without a sign, unsigned ones those with it. Two passes over integers, where ``mx.isfinite``
    makes half a dozen over booleans and costs as much CPU time as ``mx.quantize``.
    """
    import mlx.core as mx

    signed, unsigned, infinity = {
        mx.float16: (mx.int16, mx.uint16, 0x7C00),
        mx.bfloat16: (mx.int16, mx.uint16, 0x7F80),
        mx.float32: (mx.int32, mx.uint32, 0x7F80_0000),
    }[array.dtype]
    minus_infinity = infinity | 1 << (8 * array.itemsize - 1)
    return (array.view(signed).max() < infinity) & (array.view(unsigned).max() < mx.array(minus_infinity, unsigned))
