"""``fit``: scale and bias of each affine group searched and refitted by weighted least squares.

MLX stores a group as ``scale * q + bias``. Rounding between the group's minimum and maximum spends codes on
outliers; a tighter range, refitted to the codes that it gives, loses less. The search over starting ranges and
the refit follow llama.cpp's ``make_qkx2_quants`` (ggml-quants.c), the column weights its importance matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide, Method, Needs

if TYPE_CHECKING:
    import mlx.core as mx

# Starting ranges tried, as shares of the group's own range: the fewer the codes, the more clipping pays.
START_RANGES: dict[int, tuple[float, ...]] = {
    2: (1.0, 0.85, 0.75, 0.65, 0.55),
    3: (1.0, 0.92, 0.85, 0.78, 0.7),
    4: (1.0, 0.96, 0.92, 0.87, 0.82),
    5: (1.0, 0.97, 0.94, 0.9),
    6: (1.0, 0.97, 0.94),
    8: (1.0,),
}
REFITS = 3
# A column weighs at least this share of its group's mean: calibration text sees only some of what a column does.
WEIGHT_FLOOR = 0.05
# Elements worked on at once: large enough for a GPU, small enough for a CPU's cache and for streaming.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Grid:
    """Affine grids of many groups: ``scale`` and ``bias`` (..., groups, 1), float32 holding stored values."""

    scale: mx.array
    bias: mx.array

    @cached_property
    def inverse(self) -> mx.array:
        """1 / scale, and 0 where the scale is 0 (a group of equal weights)."""
        import mlx.core as mx

        usable = self.scale != 0
        return mx.where(usable, 1 / mx.where(usable, self.scale, 1), 0)

    @cached_property
    def offset(self) -> mx.array:
        """What added to ``weight * inverse`` makes the nearest code the integer part."""
        return 0.5 - self.bias * self.inverse


def affine_fit(
    weight: mx.array, fmt: Format, importance: mx.array | None = None, *, dtype: mx.Dtype | None = None
) -> Encoded:
    """Encode ``weight`` (..., rows, columns) in the affine format ``fmt``.

    ``importance`` (..., columns), broadcast over rows, is each input's second moment; None weighs columns alike.
    Scales and biases are stored in ``dtype`` (default: the weight's). In each group the squared error weighted
    by ``group_weights`` is never above that of ``mx.quantize`` followed by the nearest code.
    """
    import mlx.core as mx

    dtype = dtype or weight.dtype
    *lead, rows, columns = weight.shape
    stack = weight.reshape(-1, rows, columns)
    weights = None
    if importance is not None:
        weights = group_weights(mx.broadcast_to(importance, (*lead, columns)).reshape(-1, columns), fmt)
    step = max(1, BLOCK_ELEMENTS // columns)
    blocks: list[Encoded] = []
    for matrix in range(stack.shape[0]):
        for start in range(0, rows, step):
            block = _fit_rows(
                stack[matrix, start : start + step], fmt, None if weights is None else weights[matrix], dtype
            )
            mx.eval(block.arrays())
            blocks.append(block)
    return Encoded.joined(blocks, *lead, rows)


def group_weights(importance: mx.array, fmt: Format) -> mx.array:
    """Column weights (..., columns / group, group), mean about 1 in each group and floored, from second moments.

    Only ratios within a group matter to its fit. The floor bounds them where one column carries nearly all the
    second moment; without it the others would be fitted to noise.
    """
    import mlx.core as mx

    groups = importance.astype(mx.float32).reshape(*importance.shape[:-1], -1, fmt.group_size)
    mean = groups.mean(axis=-1, keepdims=True)
    relative = mx.where(mean > 0, groups / mx.where(mean > 0, mean, 1), 1)
    return mx.maximum(relative, WEIGHT_FLOOR)


def _fit_rows(weight: mx.array, fmt: Format, weights: mx.array | None, dtype: mx.Dtype) -> Encoded:
    """Encode one block of rows (rows, columns)."""
    import mlx.core as mx

    rows, columns = weight.shape
    groups = weight.astype(mx.float32).reshape(rows, -1, fmt.group_size)
    grid = best_grid(groups, fmt, weights, dtype)
    codes = nearest_codes(groups, grid, fmt.bits).astype(mx.uint8)
    return Encoded(
        fmt.pack(codes.reshape(rows, columns)),
        grid.scale.squeeze(-1).astype(dtype),
        grid.bias.squeeze(-1).astype(dtype),
    )


def best_grid(groups: mx.array, fmt: Format, weights: mx.array | None, dtype: mx.Dtype) -> Grid:
    """The grid of least weighted squared error found for each of ``groups`` (..., n, group_size) float32.

    ``weights`` broadcasts against ``groups``. Candidates: ``mx.quantize``'s own grid, the group's range, and the
    best of several clipped ranges after least squares, refitted ``REFITS`` times; each is rounded to ``dtype``
    before it is judged.
    """
    import mlx.core as mx

    if weights is None:
        weights = mx.ones(groups.shape[-1])
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    steps = 2**fmt.bits - 1

    best = _minmax_grid(groups, fmt, dtype)
    loss = _Fitted.of(groups, best, weights, fmt.bits).loss
    start, promise = best, mx.full(loss.shape, mx.inf)
    for share in START_RANGES[fmt.bits]:
        grid = _stored(2 * share / steps * half, middle - share * half, dtype)
        fitted = _Fitted.of(groups, grid, weights, fmt.bits)
        if share == 1.0:
            best, loss = _better(best, loss, grid, fitted.loss)
        start, promise = _better(start, promise, fitted.refit(dtype), fitted.loss_after_refit)
    for _ in range(REFITS):
        fitted = _Fitted.of(groups, start, weights, fmt.bits)
        best, loss = _better(best, loss, start, fitted.loss)
        start = fitted.refit(dtype)
    return _better(best, loss, start, _Fitted.of(groups, start, weights, fmt.bits).loss)[0]


def nearest_codes(groups: mx.array, grid: Grid, bits: int) -> mx.array:
    """The code (..., group_size) float32 nearest to each weight on its grid."""
    import mlx.core as mx

    # A cast truncates, which on a CPU is several times faster than mx.round.
    return mx.clip(groups * grid.inverse + grid.offset, 0.5, 2**bits - 0.5).astype(mx.uint8).astype(mx.float32)


@dataclass(frozen=True)
class _Fitted:
    """Weighted sums over each group of residuals r and codes q on a grid: what least squares needs."""

    grid: Grid
    loss: mx.array
    r: mx.array
    q: mx.array
    rq: mx.array
    qq: mx.array
    w: mx.array

    @classmethod
    def of(cls, groups: mx.array, grid: Grid, weights: mx.array, bits: int) -> _Fitted:
        codes = nearest_codes(groups, grid, bits)
        residual = groups - (codes * grid.scale + grid.bias)
        weighted = residual * weights
        weighted_codes = codes * weights

        def total(values: mx.array) -> mx.array:
            return values.sum(axis=-1, keepdims=True)

        return cls(
            grid=grid,
            loss=total(weighted * residual),
            r=total(weighted),
            q=total(weighted_codes),
            rq=total(weighted * codes),
            qq=total(weighted_codes * codes),
            w=weights.sum(axis=-1, keepdims=True),
        )

    @property
    def _scale_change(self) -> mx.array:
        """Change of scale that, with the best bias, minimises the weighted squared residual."""
        import mlx.core as mx

        spread = self.w * self.qq - self.q * self.q
        usable = spread > 1e-6 * self.w * self.qq
        return mx.where(usable, (self.w * self.rq - self.q * self.r) / mx.where(usable, spread, 1), 0)

    @property
    def loss_after_refit(self) -> mx.array:
        """Loss with the codes kept and scale and bias refitted, before rounding them."""
        covariance = self.rq - self.q * self.r / self.w
        return self.loss - self.r * self.r / self.w - self._scale_change * covariance

    def refit(self, dtype: mx.Dtype) -> Grid:
        """Least squares for the codes kept; the bias is the best one for the scale as rounded."""
        import mlx.core as mx

        scale = (self.grid.scale + self._scale_change).astype(dtype).astype(mx.float32)
        bias = self.grid.bias + (self.r - (scale - self.grid.scale) * self.q) / self.w
        return _stored(scale, bias, dtype)


def _minmax_grid(groups: mx.array, fmt: Format, dtype: mx.Dtype) -> Grid:
    """The grid that ``mx.quantize`` itself gives to weights of type ``dtype``."""
    import mlx.core as mx

    flat = groups.reshape(-1, fmt.group_size).astype(dtype)
    _, scale, bias = mx.quantize(flat, group_size=fmt.group_size, bits=fmt.bits)
    shape = (*groups.shape[:-1], 1)
    return Grid(scale.reshape(shape).astype(mx.float32), bias.reshape(shape).astype(mx.float32))


def _stored(scale: mx.array, bias: mx.array, dtype: mx.Dtype) -> Grid:
    import mlx.core as mx

    return Grid(scale.astype(dtype).astype(mx.float32), bias.astype(dtype).astype(mx.float32))


def _better(grid: Grid, loss: mx.array, other: Grid, other_loss: mx.array) -> tuple[Grid, mx.array]:
    """Per group the grid of smaller loss, and that loss."""
    import mlx.core as mx

    wins = other_loss < loss
    scale = mx.where(wins, other.scale, grid.scale)
    return Grid(scale, mx.where(wins, other.bias, grid.bias)), mx.where(wins, other_loss, loss)


class _AffineFit(Method):
    name = "fit"
    does = "refits each grid"
    uses = Needs.SECOND_MOMENTS

    def takes(self, fmt: Format) -> bool:
        return fmt.kind.scale_codes is None

    def encode(self, weight: mx.array, fmt: Format, guide: Guide) -> Encoded:
        return affine_fit(weight, fmt, guide.importance)


AFFINE_FIT = _AffineFit()
