"""``rtn``: round to nearest, MLX's own ``mx.quantize``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide, Method

if TYPE_CHECKING:
    import mlx.core as mx


def round_to_nearest(weight: mx.array, fmt: Format) -> Encoded:
    """MLX's own ``mx.quantize`` of ``weight`` (..., rows, columns)."""
    import mlx.core as mx

    return Encoded(*mx.quantize(weight, fmt.group_size, fmt.bits, fmt.mode))


class _RoundToNearest(Method):
    name = "rtn"
    does = "rounds"

    def encode(self, weight: mx.array, fmt: Format, guide: Guide) -> Encoded:
        return round_to_nearest(weight, fmt)


RTN = _RoundToNearest()
