"""Between numpy and MLX: BF16, which numpy has no name for, goes as its 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy.typing as npt

# By stored dtype, the least bits, sign left out, that are no finite number: infinity where the dtype has one
# (IEEE 754), else NaN (OCP 8-bit floating point specification 1.0 for E4M3; E8M0 has no sign either).
NOT_FINITE: dict[str, int] = {
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
    "F8_E8M0": 0xFF,
}
_WITHOUT_INFINITY = ("F8_E4M3", "F8_E8M0")


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


def rows_finite(rows: npt.NDArray[Any], dtype: str) -> bool:
    """Whether no number of a numpy block of a stored ``dtype`` is NaN or infinite; integers never are.

    As ``all_finite``, on the bytes as they were read: nothing is copied.
    """
    if dtype not in NOT_FINITE or not rows.size:
        return True
    width, limit = 8 * rows.dtype.itemsize, NOT_FINITE[dtype]
    unsigned = rows.view(f"uint{width}")
    if dtype == "F8_E8M0":
        return bool(unsigned.max() < limit)
    return bool(rows.view(f"int{width}").max() < limit and unsigned.max() < (limit | 1 << (width - 1)))


def nan_and_infinity(rows: npt.NDArray[Any], dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Where a numpy block of a stored float ``dtype`` is NaN, and where it is infinite, as booleans of its shape."""
    import numpy as np

    width, limit = 8 * rows.dtype.itemsize, NOT_FINITE[dtype]
    size = rows.view(f"uint{width}")
    if dtype != "F8_E8M0":
        size = size & np.asarray((1 << (width - 1)) - 1, size.dtype)
    if dtype in _WITHOUT_INFINITY:
        return size >= limit, np.zeros(size.shape, bool)
    return size > limit, size == limit
