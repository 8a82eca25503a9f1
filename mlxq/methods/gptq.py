"""``gptq``: codes chosen one column after another, each column's error made good by the columns still to come.

Frantar et al., "GPTQ" (arXiv:2210.17323): with H the second moment of the inputs, rounding column j costs
``error_j ** 2 / U_jj ** 2`` where U is the upper Cholesky factor of the inverse of H, and the columns after j
then move by ``-error_j / U_jj * U[j, j+1:]``. Here the grid of each group is fitted (``affine_fit``) when its
turn comes, to the columns as the earlier errors left them, with ``1 / U_jj ** 2`` for weights: what an error there
costs once later columns have made good what they can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxq.methods.affine_fit import AFFINE_FIT, Grid, best_grid, nearest_codes
from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide, Method, Needs

if TYPE_CHECKING:
    import mlx.core as mx

# Added to the diagonal of H, as a share of its mean: bounds the feedback where calibration saw little.
DAMPING = 0.01
# The same for an embedding tied to the head: its rows also enter the model as they are, where no column makes good
# another's error.
TIED_DAMPING = 0.1
# At so many bits and more there is no error left worth feeding back.
MOST_BITS = 8
# Columns updated one by one before a matrix product carries their errors to the rest of the group.
PANEL_COLUMNS = 16
# Floats of Cholesky factors held at once: expert stacks are encoded a few experts at a time.
FACTOR_ELEMENTS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Feedback(Guide):
    """What a Hessian says of one module and group size: where each column's error goes.

    ``order`` (..., columns) is the order the columns are taken in, ``factor`` (..., columns, columns) float32 the
    upper U with Uᵀ U the inverse of the Hessian in that order; leading axes are experts.
    """

    order: mx.array
    factor: mx.array

    def of_expert(self, expert: int) -> Feedback:
        return Feedback(order=self.order[expert], factor=self.factor[expert])


def feedback(hessian: mx.array, group_size: int, damping: float = DAMPING) -> Feedback:
    """Prepare ``hessian`` (..., columns, columns), the mean of x xᵀ over the inputs, for one group size.

    Evaluated a few experts at a time: their factors are the largest thing here.
    """
    import mlx.core as mx

    *lead, columns, _ = hessian.shape
    stack = hessian.reshape(-1, columns, columns)
    orders, factors = [], []
    for start in range(0, stack.shape[0], max(1, FACTOR_ELEMENTS // columns**2)):
        part = stack[start : start + max(1, FACTOR_ELEMENTS // columns**2)]
        order = _group_order(part, group_size)
        part = mx.take_along_axis(mx.take_along_axis(part, order[:, :, None], axis=1), order[:, None], axis=2)
        orders.append(order)
        factors.append(inverse_factor(part, damping))
        mx.eval(orders[-1], factors[-1])
    order, factor = mx.concatenate(orders), mx.concatenate(factors)
    return Feedback(order=order.reshape(*lead, columns), factor=factor.reshape(*lead, columns, columns))


def gptq(weight: mx.array, fmt: Format, ahead: Feedback, *, dtype: mx.Dtype | None = None) -> Encoded:
    """Encode ``weight`` (..., rows, columns) in the affine format ``fmt`` with error feedback.

    ``ahead`` is the module's, for the same group size, with one entry for each leading index (expert). Rows are
    encoded independently of each other, so any share of them gives the same codes as the whole.
    """
    import mlx.core as mx

    dtype = dtype or weight.dtype
    *lead, rows, columns = weight.shape
    stack = weight.reshape(-1, rows, columns)
    orders = mx.broadcast_to(ahead.order, (*lead, columns)).reshape(-1, columns)
    factors = mx.broadcast_to(ahead.factor, (*lead, columns, columns)).reshape(-1, columns, columns)
    step = max(1, FACTOR_ELEMENTS // columns**2)
    blocks: list[Encoded] = []
    for start in range(0, stack.shape[0], step):
        part = slice(start, start + step)
        block = _encode(stack[part], fmt, orders[part], factors[part], dtype)
        mx.eval(block.arrays())
        blocks.append(block)
    return Encoded.joined(blocks, *lead, rows)


def _encode(weight: mx.array, fmt: Format, order: mx.array, factor: mx.array, dtype: mx.Dtype) -> Encoded:
    """Encode ``weight`` (experts, rows, columns) by ``order`` (experts, columns) and ``factor``."""
    import mlx.core as mx

    columns = weight.shape[-1]
    group = fmt.group_size
    inverse_order = mx.argsort(order, axis=-1)
    # Columns first: one column of every row is then contiguous.
    rest = mx.take_along_axis(weight.astype(mx.float32).swapaxes(1, 2), order[:, :, None], axis=1)
    codes: list[mx.array] = []
    grids: list[Grid] = []
    for start in range(0, columns, group):
        stop = start + group
        block, rest = rest[:, :group], rest[:, group:]
        block_codes, errors, grid = _encode_group(block, factor[:, start:stop, start:stop], fmt, dtype)
        codes.append(block_codes)
        grids.append(grid)
        if stop < columns:
            rest = rest - factor[:, start:stop, stop:].swapaxes(1, 2) @ errors
        mx.eval(rest, block_codes, grid.scale, grid.bias)
    stored = mx.take_along_axis(mx.concatenate(codes, axis=1), inverse_order[:, :, None], axis=1)
    group_index = inverse_order[:, ::group] // group
    scales, biases = (
        mx.take_along_axis(mx.concatenate(parts, axis=-1), group_index[:, None], axis=-1).astype(dtype)
        for parts in ([grid.scale for grid in grids], [grid.bias for grid in grids])
    )
    return Encoded(fmt.pack(stored.swapaxes(1, 2)), scales, biases)


def _group_order(hessian: mx.array, group: int) -> mx.array:
    """An order (experts, columns) that takes groups, and columns in a group, by falling second moment.

    Groups stay whole, so the stored order of columns need not change.
    """
    import mlx.core as mx

    diagonal = mx.diagonal(hessian, axis1=-2, axis2=-1)
    grouped = diagonal.reshape(diagonal.shape[0], -1, group)
    within = mx.argsort(-grouped, axis=-1) + mx.arange(0, diagonal.shape[1], group)[:, None]
    groups = mx.argsort(-grouped.mean(axis=-1), axis=-1)
    return mx.take_along_axis(within, groups[:, :, None], axis=1).reshape(diagonal.shape)


def inverse_factor(hessian: mx.array, damping: float = DAMPING) -> mx.array:
    """Upper U with Uᵀ U the inverse of the damped ``hessian`` (..., n, n).

    With the order of indices reversed, H is L Lᵀ; reversed back, L is an upper R with H = R Rᵀ, and U is the
    inverse of R: one Cholesky factorisation and one triangular inverse, and H itself is never inverted.
    """
    import mlx.core as mx

    diagonal = mx.diagonal(hessian, axis1=-2, axis2=-1)
    mean = diagonal.mean(axis=-1, keepdims=True)
    # Inputs that were zero throughout (or an expert never called) leave plain rounding.
    mean = mx.where(mean > 0, mean, 1)
    damped = hessian.astype(mx.float32) + mx.eye(hessian.shape[-1]) * (damping * mean)[..., None]
    reversed_ = damped[..., ::-1, ::-1]
    lower = mx.linalg.cholesky(reversed_, stream=mx.cpu)
    return mx.linalg.tri_inv(lower, upper=False, stream=mx.cpu)[..., ::-1, ::-1]


def _encode_group(block: mx.array, factor: mx.array, fmt: Format, dtype: mx.Dtype) -> tuple[mx.array, mx.array, Grid]:
    """Encode the columns of one group (experts, group_size, rows), first to last.

    ``factor`` (experts, group_size, group_size) is the group's block of U. Returns codes uint8, errors over U_jj
    (both like ``block``), and the grid (experts, rows, 1).
    """
    import mlx.core as mx

    diagonal = mx.diagonal(factor, axis1=-2, axis2=-1)
    weights = 1 / (diagonal * diagonal)
    weights = weights / weights.mean(axis=-1, keepdims=True)
    grid = best_grid(block.swapaxes(1, 2), fmt, weights[:, None], dtype)
    column_grid = Grid(grid.scale.swapaxes(1, 2), grid.bias.swapaxes(1, 2))
    codes: list[mx.array] = []
    errors: list[mx.array] = []
    for start in range(0, fmt.group_size, PANEL_COLUMNS):
        panel, block = block[:, :PANEL_COLUMNS], block[:, PANEL_COLUMNS:]
        stop = start + PANEL_COLUMNS
        panel_errors: list[mx.array] = []
        for j in range(start, stop):
            column, panel = panel[:, :1], panel[:, 1:]
            code = nearest_codes(column, column_grid, fmt.bits)
            error = (column - (code * column_grid.scale + column_grid.bias)) / diagonal[:, j, None, None]
            if j + 1 < stop:
                panel = panel - factor[:, j, j + 1 : stop, None] * error
            codes.append(code.astype(mx.uint8))
            panel_errors.append(error)
        errors.append(mx.concatenate(panel_errors, axis=1))
        if stop < fmt.group_size:
            block = block - factor[:, start:stop, stop:].swapaxes(1, 2) @ errors[-1]
    return mx.concatenate(codes, axis=1), mx.concatenate(errors, axis=1), grid


class _Gptq(Method):
    name = "gptq"
    does = "adds error feedback"
    needs = uses = Needs.HESSIANS

    def takes(self, fmt: Format) -> bool:
        return AFFINE_FIT.takes(fmt)

    def pays(self, fmt: Format) -> bool:
        return fmt.bits < MOST_BITS

    def least_rows(self, columns: int) -> int:
        return columns // 2

    def guide(self, second_moment: mx.array, hessian: mx.array | None, fmt: Format, *, tied: bool) -> Guide:
        if hessian is None:
            return Guide(second_moment)
        return feedback(hessian, fmt.group_size, TIED_DAMPING if tied else DAMPING)

    def encode(self, weight: mx.array, fmt: Format, guide: Guide) -> Encoded:
        if isinstance(guide, Feedback):
            return gptq(weight, fmt, guide)
        # The text never reached the module, so nothing is known of where its errors go.
        return AFFINE_FIT.encode(weight, fmt, guide)


GPTQ = _Gptq()
