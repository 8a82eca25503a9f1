"""``fit`` for the microscaling modes (mxfp4, nvfp4, mxfp8): the shared scale chosen by weighted error.

A group is stored as ``scale * value``, the values those of a small float type and the scale a power of two
(E8M0) or, for nvfp4, an E4M3 number (OCP Microscaling Formats specification v1.0). ``mx.quantize`` takes the scale
from the largest weight alone; here its neighbours are tried and the one of least weighted squared error stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxq.methods.affine_fit import BLOCK_ELEMENTS, group_weights
from mlxq.methods.encoded import Encoded, decode, pack, round_to_nearest
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx

# Magnitudes of E2M1 by code, and the midpoints between them; the sign is the code's bit 3.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Stored scale codes tried on either side of mx.quantize's: E8M0 codes are a factor 2 apart, E4M3's 6 to 12%.
NEIGHBOURS: dict[str, tuple[int, ...]] = {
    "mxfp4": (-1, 1),
    "nvfp4": (-4, -3, -2, -1, 1, 2, 3),
    "mxfp8": (-1, 1),
}
LARGEST_SCALE_CODE: dict[str, int] = {"mxfp4": 254, "nvfp4": 126, "mxfp8": 254}


def mx_fit(weight: mx.array, fmt: Format, importance: mx.array | None = None) -> Encoded:
    """Encode ``weight`` (..., rows, columns) in the microscaling format ``fmt``.

    ``importance`` (..., columns), broadcast over rows, is each input's second moment; None weighs columns alike.
    In each group the weighted squared error is never above that of ``mx.quantize``.
    """
    import mlx.core as mx

    *lead, rows, columns = weight.shape
    stack = weight.reshape(-1, rows, columns)
    weights = mx.ones((stack.shape[0], 1, fmt.group_size))
    if importance is not None:
        weights = group_weights(mx.broadcast_to(importance, (*lead, columns)).reshape(-1, columns), fmt)
    step = max(1, BLOCK_ELEMENTS // columns)
    blocks: list[Encoded] = []
    for matrix in range(stack.shape[0]):
        for start in range(0, rows, step):
            block = _fit_rows(stack[matrix, start : start + step], fmt, weights[matrix])
            mx.eval(block.arrays())
            blocks.append(block)
    return Encoded(
        mx.concatenate([block.weight for block in blocks]).reshape(*lead, rows, -1),
        mx.concatenate([block.scales for block in blocks]).reshape(*lead, rows, -1),
        None,
    )


def _fit_rows(weight: mx.array, fmt: Format, weights: mx.array) -> Encoded:
    import mlx.core as mx

    rows = weight.shape[0]
    groups = weight.astype(mx.float32).reshape(rows, -1, fmt.group_size)
    best = round_to_nearest(weight, fmt)
    loss = _loss(groups, best, fmt, weights)
    first = best.scales
    for step in NEIGHBOURS[fmt.mode]:
        scales = mx.clip(first.astype(mx.int32) + step, 0, LARGEST_SCALE_CODE[fmt.mode]).astype(mx.uint8)
        tried = _rounded(groups, scales, fmt)
        tried_loss = _loss(groups, tried, fmt, weights)
        wins = tried_loss < loss
        words = best.weight.shape[-1] // scales.shape[-1]
        best = Encoded(
            mx.where(mx.repeat(wins, words, axis=-1), tried.weight, best.weight),
            mx.where(wins, scales, best.scales),
            None,
        )
        loss = mx.where(wins, tried_loss, loss)
    return best


def _rounded(groups: mx.array, scales: mx.array, fmt: Format) -> Encoded:
    """``groups`` (rows, n, group_size) rounded to the values that the stored ``scales`` (rows, n) allow."""
    import mlx.core as mx

    factor = scale_values(scales, fmt)[..., None]
    scaled = mx.where(factor > 0, groups / mx.where(factor > 0, factor, 1), 0)
    if fmt.bits == 8:
        codes = mx.to_fp8(mx.clip(scaled, -448.0, 448.0))
    else:
        size = mx.abs(scaled)
        codes = 8 * (scaled < 0).astype(mx.uint8)
        for middle in E2M1_MIDPOINTS:
            codes = codes + (size > middle).astype(mx.uint8)
    return Encoded(pack(codes.reshape(groups.shape[0], -1), fmt.bits), scales, None)


def scale_values(scales: mx.array, fmt: Format) -> mx.array:
    """The float32 values that stored uint8 scales stand for."""
    import mlx.core as mx

    if fmt.mode == "nvfp4":
        return mx.from_fp8(scales, dtype=mx.float32)
    return mx.power(2.0, scales.astype(mx.float32) - 127)


def _loss(groups: mx.array, encoded: Encoded, fmt: Format, weights: mx.array) -> mx.array:
    """Weighted squared error of each group (rows, n)."""
    error = groups - decode(encoded, fmt).reshape(groups.shape)
    return (weights * error * error).sum(axis=-1)
