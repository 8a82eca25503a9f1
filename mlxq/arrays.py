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
    """An array as a numpy matrix of its rows; a scalar stays one."""
    import mlx.core as mx
    import numpy as np

    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.asarray(plain if array.ndim == 0 else plain.reshape(-1, array.shape[-1]))
