"""Numbers that a run may not write: what was damaged before, and what a cast or an encoding would spoil.

Every float that is copied, cast or encoded is looked at, as it comes and as it goes. Only parameters of the model are:
buffers that its code leaves behind (masks, tables) may hold what they like.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlxq.arrays import NOT_FINITE, all_finite, as_matrix, nan_and_infinity
from mlxq.errors import MlxqError
from mlxq.methods.formats import Format
from mlxq.planning.plan import Step
from mlxq.tensors import FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy.typing as npt


def encoded_whole(fmt: Format, parts: Mapping[str, mx.array]) -> mx.array:
    """Whether what lies beside the codes of ``parts`` stands for finite numbers, as a scalar yet to be evaluated.

    Scales that are codes must lie below the largest as well: a scale that would be larger was cut to it.
    """
    import mlx.core as mx

    codes = fmt.kind.scale_codes
    if codes is not None:
        return parts["scales"].max() < codes.largest
    beside = [parts[name] for name in fmt.kind.beside]
    return mx.stack([all_finite(array) for array in beside]).all()


def damaged(spec: TensorSpec, rows: npt.NDArray[Any], dtype: str, start: int) -> MlxqError | None:
    """The error for ``rows`` of a parameter, the first of them ``start``, as they were read; None where they are whole.

    ``dtype`` is what they are stored in, which may be no float.
    """
    if dtype not in NOT_FINITE:
        return None
    nan, infinite = nan_and_infinity(rows, dtype)
    if not (nan | infinite).any():
        return None
    what = " and ".join(name for name, found in (("NaN", nan), ("infinity", infinite)) if found.any())
    return MlxqError(
        f"{spec.name} holds {what} in {_where(spec, nan | infinite, start)}",
        "The source is damaged: fetch or convert it again. mlxq inspect --check lists all such tensors.",
    )


def spoilt(step: Step, read: mx.array, cast: mx.array, parts: Mapping[str, mx.array], start: int) -> MlxqError | None:
    """The error for rows of a step of which not all that is to be written are finite numbers, or None.

    ``read`` (rows, columns) are they in float32 before anything was done, ``cast`` in the step's dtype, and ``parts``
    as they are written. The first of the rows is ``start``.
    """
    import mlx.core as mx
    import numpy as np

    spec = step.spec
    numbers = as_matrix(read)
    if error := damaged(spec, numbers, "F32", start):
        return error
    nan, infinite = nan_and_infinity(as_matrix(cast), spec.dtype)
    dtype = FLOAT_DTYPES[spec.dtype]
    if (lost := nan | infinite).any():
        largest, ends = float(np.abs(numbers).max()), mx.finfo(getattr(mx, dtype)).max
        wider = "bfloat16 reaches as far as float32" if dtype == "float16" else "float32 holds it"
        return MlxqError(
            f"{spec.name}: the cast to {dtype} would write infinity in {_where(spec, lost, start)}: "
            f"the largest number there is {largest:.6g}, and {dtype} ends at {ends:.6g}",
            f"Choose another dtype (--dtype, or dtype: in a recipe): {wider}.",
        )
    return _spoilt_scales(spec, numbers, step.format, parts, start) if step.format else None


def _spoilt_scales(
    spec: TensorSpec, numbers: npt.NDArray[Any], fmt: Format, parts: Mapping[str, mx.array], start: int
) -> MlxqError | None:
    """The error for scales or biases that are no finite numbers, or were cut to the largest that there is."""
    import numpy as np

    codes = fmt.kind.scale_codes
    if codes is None:
        broken = np.zeros(parts["scales"].shape, bool)
        for name in fmt.kind.beside:
            broken |= np.logical_or(*nan_and_infinity(as_matrix(parts[name]), spec.dtype))
        ends = f"its scales are {FLOAT_DTYPES[spec.dtype]}"
    else:
        scales = np.asarray(parts["scales"])
        decoded = np.abs(np.asarray(fmt.decode(parts))).reshape(*scales.shape, -1).max(-1)
        wanted = np.abs(numbers).reshape(*scales.shape, -1).max(-1)
        # The largest scale rightly chosen stands for numbers within the rounding of the mode (at most a quarter).
        broken = (scales > codes.largest) | ((scales == codes.largest) & (decoded < 0.75 * wanted))
        ends = f"the scales of {fmt.mode} end at {float(_largest_scale(fmt)):.6g}"
    if not broken.any():
        return None
    rows = np.flatnonzero(broken.any(-1))
    span = float(numbers[rows].max()) - float(numbers[rows].min())
    other = "keep: true in a recipe leaves this module as it is."
    if spec.dtype == "F16":
        other = f"Choose dtype: bfloat16, which reaches as far as float32; or {other}"
    elif codes is not None:
        other = f"Choose another mode for this module; or {other}"
    return MlxqError(
        f"{spec.name}: the range of its numbers in {_where(spec, broken, start)} ({span:.6g}) is too large for "
        f"{fmt.in_words()}: {ends}",
        other[0].upper() + other[1:] if codes is not None or spec.dtype == "F16" else f"In a recipe, {other}",
    )


def _largest_scale(fmt: Format) -> Any:
    import mlx.core as mx

    assert fmt.kind.scale_codes is not None
    return fmt.kind.scale_codes.values(mx.array(fmt.kind.scale_codes.largest, mx.uint8)).item()


def _where(spec: TensorSpec, wrong: npt.NDArray[Any], start: int) -> str:
    """Which rows of a matrix, or numbers of a vector, are meant: ``row 3``, or ``rows 3 to 9``, counted from 0."""
    import numpy as np

    what, first = ("row", start) if len(spec.shape) > 1 else ("number", 0)
    found = np.flatnonzero(wrong.any(-1) if what == "row" else wrong) + first
    if len(found) == 1:
        return f"{what} {found[0]:,}"
    return f"{len(found):,} {what}s from {found[0]:,} to {found[-1]:,}"
