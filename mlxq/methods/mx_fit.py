"""``fit`` for the microscaling modes (mxfp4, nvfp4, mxfp8): the shared scale chosen by weighted error.

A group is stored as ``scale * value``, the values those of a small float type and the scale a power of two
(E8M0) or, for nvfp4, an E4M3 number (OCP Microscaling Formats specification v1.0). ``mx.quantize`` takes the scale
from the largest weight alone; here its neighbours are tried and the one of least weighted squared error stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxq.methods.affine_fit import BLOCK_ELEMENTS, group_weights
from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide, Method, Needs
from mlxq.methods.rtn import round_to_nearest

if TYPE_CHECKING:
    import mlx.core as mx


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
    return Encoded.joined(blocks, *lead, rows)


def _fit_rows(weight: mx.array, fmt: Format, weights: mx.array) -> Encoded:
    import mlx.core as mx

    codes = fmt.kind.scale_codes
    assert codes is not None, "a mode without codes for its scales has nothing to step through"
    rows = weight.shape[0]
    groups = weight.astype(mx.float32).reshape(rows, -1, fmt.group_size)
    best = round_to_nearest(weight, fmt)
    loss = _loss(groups, best, fmt, weights)
    first = best.scales
    for step in codes.neighbours:
        scales = mx.clip(first.astype(mx.int32) + step, 0, codes.largest).astype(mx.uint8)
        tried = _rounded(groups, scales, codes.values(scales), fmt)
        tried_loss = _loss(groups, tried, fmt, weights)
        wins = tried_loss < loss
        words = best.weight.shape[-1] // scales.shape[-1]
        best = Encoded(
            mx.where(mx.repeat(wins, words, axis=-1), tried.weight, best.weight),
            mx.where(wins, scales, best.scales),
        )
        loss = mx.where(wins, tried_loss, loss)
    return best


def _rounded(groups: mx.array, scales: mx.array, values: mx.array, fmt: Format) -> Encoded:
    """``groups`` (rows, n, group_size) rounded to what the stored ``scales`` (rows, n), worth ``values``, allow."""
    import mlx.core as mx

    assert fmt.kind.nearest is not None
    factor = values[..., None]
    scaled = mx.where(factor > 0, groups / mx.where(factor > 0, factor, 1), 0)
    return Encoded(fmt.pack(fmt.kind.nearest(scaled).reshape(groups.shape[0], -1)), scales)


def _loss(groups: mx.array, encoded: Encoded, fmt: Format, weights: mx.array) -> mx.array:
    """Weighted squared error of each group (rows, n)."""
    error = groups - fmt.decode(encoded.arrays()).reshape(groups.shape)
    return (weights * error * error).sum(axis=-1)


class _MicroscalingFit(Method):
    name = "fit"
    does = "refits each grid"
    uses = Needs.SECOND_MOMENTS

    def takes(self, fmt: Format) -> bool:
        return fmt.kind.scale_codes is not None

    def encode(self, weight: mx.array, fmt: Format, guide: Guide) -> Encoded:
        return mx_fit(weight, fmt, guide.importance)


MX_FIT = _MicroscalingFit()
