"""Weights as MLX stores them quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class Encoded:
    """``weight`` (..., rows, columns * bits / 32) uint32, ``scales`` and ``biases`` (..., rows, groups).

    ``biases`` is None for the modes that have none.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None

    def arrays(self) -> dict[str, mx.array]:
        """The arrays by the names a module gives them."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @classmethod
    def joined(cls, blocks: Sequence[Encoded], *lead: int) -> Encoded:
        """Blocks of rows (rows, ...) or of matrices, one after another, as one weight with leading axes ``lead``."""
        import mlx.core as mx

        parts = {name: mx.concatenate([block.arrays()[name] for block in blocks]) for name in blocks[0].arrays()}
        return cls(**{name: part.reshape(*lead, part.shape[-1]) for name, part in parts.items()})
