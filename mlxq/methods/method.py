"""What every way to choose the numbers of a format says of itself, and what calibration gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING

from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx


class Needs(Flag):
    """What of calibration a method works with, from a pass of text through the model's blocks."""

    NOTHING = 0
    SECOND_MOMENTS = auto()
    """The mean square of each input of the module: (..., columns)."""
    HESSIANS = auto()
    """The mean of x xᵀ over the module's inputs x: (..., columns, columns)."""
    GRADIENTS = auto()
    """The gradient of the log-likelihood at the module's output."""
    TRAINING = auto()
    """A pass of its own over the blocks, in which what it encodes changes what later blocks are given."""


@dataclass(frozen=True)
class Guide:
    """What calibration says of a module's inputs: ``importance`` (..., columns) is their second moment.

    None where there was no text, or the text never reached the module. Leading axes are experts.
    """

    importance: mx.array | None = None

    def of_expert(self, expert: int) -> Guide:
        """The share of one expert of a stack."""
        return Guide(None if self.importance is None else self.importance[expert])

    def arrays(self) -> list[mx.array]:
        """All that it holds, to be evaluated before another thread encodes by it."""
        return [array for array in vars(self).values() if array is not None]


class Method(ABC):
    """A way to choose the numbers of a format; ``methods.registry`` lists them all.

    ``needs`` is what it cannot work without; ``uses`` what it works with where there is any, ``needs`` included.
    ``rows_independent`` says that any share of a weight's rows is encoded as in the whole, so that it may stream in
    blocks of rows.
    """

    name: str
    does: str
    """What it does, as in "rtn rounds"."""
    needs: Needs = Needs.NOTHING
    uses: Needs = Needs.NOTHING
    rows_independent: bool = True

    def takes(self, fmt: Format) -> bool:
        """Whether it can encode ``fmt``."""
        return True

    def pays(self, fmt: Format) -> bool:
        """Whether it is worth its time in ``fmt``: ``auto`` leaves it out where not."""
        return True

    def least_rows(self, columns: int) -> int:
        """Rows that a block should have at least, for work that is the same for any count of rows."""
        return 1

    def guide(self, second_moment: mx.array, hessian: mx.array | None, fmt: Format, *, tied: bool) -> Guide:
        """What ``encode`` will be given of one module's statistics; modules on the same inputs may share it.

        ``hessian`` is there where the method uses one and memory allows; ``tied`` says that the weight is also
        an embedding.
        """
        return Guide(second_moment)

    @abstractmethod
    def encode(self, weight: mx.array, fmt: Format, guide: Guide) -> Encoded:
        """Encode ``weight`` (..., rows, columns) in ``fmt``; scales and biases take the weight's dtype."""


# A stack of experts whose Hessians would take more bytes is known by its second moments alone.
HESSIAN_BYTES = 2 << 30


def given_by_text(shape: tuple[int, ...]) -> Needs:
    """What calibration text gives of a module whose weight is (..., rows, columns), by way of its inputs."""
    experts = shape[0] if len(shape) == 3 else 1
    affordable = experts * shape[-1] ** 2 * 4 < HESSIAN_BYTES
    return Needs.SECOND_MOMENTS | (Needs.HESSIANS if affordable else Needs.NOTHING)
