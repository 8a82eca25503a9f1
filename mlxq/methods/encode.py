"""Rows of a weight -> the numbers stored for them, by the method that a plan names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxq.methods.encoded import Encoded, round_to_nearest
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx

    from mlxq.methods.gptq import Feedback


@dataclass(frozen=True)
class Guide:
    """What calibration says of a module's inputs: ``importance`` (..., columns) their second moment, and
    ``ahead`` for error feedback where that was prepared. None where there was no text.
    """

    importance: mx.array | None = None
    ahead: Feedback | None = None


def encode(weight: mx.array, fmt: Format, method: str, guide: Guide | None = None) -> Encoded:
    """Encode ``weight`` (..., rows, columns) in ``fmt``; scales and biases take the weight's dtype.

    ``method`` is ``rtn`` (``mx.quantize``), ``fit``, or ``gptq``, which needs ``guide.ahead`` and an affine format.
    """
    guide = guide or Guide()
    if method == "rtn":
        return round_to_nearest(weight, fmt)
    if fmt.mode != "affine":
        from mlxq.methods.mx_fit import mx_fit

        return mx_fit(weight, fmt, guide.importance)
    if method == "gptq" and guide.ahead is not None:
        from mlxq.methods.gptq import gptq

        return gptq(weight, fmt, guide.ahead)
    from mlxq.methods.affine_fit import fit

    return fit(weight, fmt, guide.importance)


def method_for(method: str, fmt: Format | None, *, has_text: bool, has_inputs: bool) -> str:
    """Which of ``rtn``, ``fit`` and ``gptq`` a recipe's ``method`` comes to for a module in ``fmt``.

    ``has_text``: there is calibration text. ``has_inputs``: the module multiplies vectors (an embedding that is not
    tied to the head only looks rows up). Error feedback needs both and an affine grid; at 8 bits there is no error
    left worth feeding back, so ``auto`` does not.
    """
    if fmt is None or method == "rtn":
        return "rtn"
    feeds_back = has_text and has_inputs and fmt.mode == "affine"
    if feeds_back and (method == "gptq" or (method == "auto" and fmt.bits < 8)):
        return "gptq"
    return "fit"
