"""A written model held against its source: each tensor's error, and what its format allows.

What is allowed, as a root mean square over the elements x of a row (or of the tensor):

- cast: u |x|, with u the unit roundoff of the dtype written (2**-8 for bfloat16, 2**-11 for float16); nothing where
  the dtype is as wide as the source's. Numbers read from quantized storage take three roundings, relative to the row.
- quantized: the gap between the numbers that x's group may become (``Format.steps``: range / (2**bits - 1) for
  affine), times a factor, and three roundings of the group's largest number for scale, bias and product. Rounding to
  nearest (``rtn``) is off by half a gap; MLX moves the grid so that the end farther from zero is exact, which with 2
  bits costs up to another quarter: its factor is 3/4, held row by row. Other methods let some elements go further so
  that outputs come nearer; errors fed back do not stop at half a gap. Theirs is 3/2, over the whole tensor. No error
  may be as large as the numbers themselves, which is what zeros would have.

A mean error of rounding is 0.29 gaps; numbers of another row, module or model are off by several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.architecture.bind import bind
from mlxq.architecture.opening import open_lazily
from mlxq.arrays import to_mlx
from mlxq.methods.formats import HELPER_PARTS, Format
from mlxq.methods.rtn import RTN
from mlxq.sources.base import ModelSource
from mlxq.sources.soundness import Read, row_blocks
from mlxq.tensors import DTYPE_BITS, FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

_UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
# Below these a dtype's numbers are a fixed distance apart: half of that.
_LEAST = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 0.0}
# The least scale that MLX stores: rounding to multiples of it is off by half.
_LEAST_SCALE = 1e-7
_ROUNDED, _CHOSEN = 0.75, 1.5


@dataclass(frozen=True)
class TensorError:
    """How far a tensor is from the source's: ``error`` and ``allowed`` are relative to its root mean square.

    Where it is not ``within`` what is allowed and rows are held singly, they are those of ``row``, the first such row.
    """

    path: str
    stored_as: str
    error: float
    allowed: float
    within: bool
    row: int | None

    def __str__(self) -> str:
        """In one clause."""
        where = f" in row {self.row:,}" if self.row is not None else ""
        allowed = f"{self.stored_as} allows {self.allowed:.3g}"
        return f"{self.path} is off by {self.error:.3g} of its size{where}, where {allowed}"


def errors_against(
    written: ModelSource, source: ModelSource, methods: Mapping[str, str]
) -> Iterator[Read | TensorError]:
    """Compare every tensor of ``written``, a folder with MLX names, block by block; progress, and an error each.

    ``methods`` names the method of each module where known; others are taken for chosen. Raises BadInputError where
    the source does not open, or lacks a tensor.
    """
    original = _Original(source)
    quantization = written.config.get("quantization") or {}
    tensors = written.tensors
    total = sum(spec.nbytes for spec in tensors.values())
    done = 0
    for name, spec in tensors.items():
        module, _, part = name.rpartition(".")
        quantized = f"{module}.scales" in tensors and part in ("weight", *HELPER_PARTS)
        done += spec.nbytes
        if quantized and part != "weight":
            continue
        fmt = Format.from_config(quantization.get(module) or quantization) if quantized else None
        found = _error(written, original, name, fmt, methods.get(module) == RTN.name)
        yield found
        yield Read(done, total, name)


class _Original:
    """The source's numbers by the paths of its MLX model; what must be assembled is held one parameter at a time."""

    def __init__(self, source: ModelSource) -> None:
        architecture = bind(source)
        self.source = source
        self.specs = {p.spec.name: p.spec for p in architecture.parameters}
        self.stored = {m.path: m.stored for m in architecture.modules if m.stored}
        self.straight = {
            p.spec.name: p.source
            for p in architecture.parameters
            if p.source is not None and p.spec.name.rpartition(".")[0] not in self.stored
        }
        self._leaves: dict[str, Any] | None = None
        self._held: tuple[str, dict[str, mx.array]] = ("", {})

    def rows(self, path: str, start: int, stop: int, row_count: int) -> mx.array:
        """Rows ``start:stop`` of a parameter as a matrix in float32; experts have ``row_count`` rows each."""
        import mlx.core as mx

        if path in self.straight:
            tensor = self.straight[path]
            return to_mlx(self.source.read_rows(tensor, start, stop), self.source.tensors[tensor].dtype).astype(
                mx.float32
            )
        parts = self._parts(path)
        fmt = self.stored.get(path.rpartition(".")[0])
        return _decoded(parts, fmt if path.endswith(".weight") else None, start, stop, row_count)

    def _parts(self, path: str) -> dict[str, mx.array]:
        """The arrays that store a parameter which no file holds as it is."""
        import mlx.core as mx
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        if self._held[0] == path:
            return self._held[1]
        self._held = ("", {})
        if self._leaves is None:
            folder = self.source.weights_folder
            assert folder is not None, "only folders mlx_lm can open are assembled"
            model, _ = open_lazily(folder, self.source.name, trusted=self.source.trusted)
            self._leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
            self._leaves |= dict(tree_flatten(model.parameters()))
        module, _, part = path.rpartition(".")
        fmt = self.stored.get(module)
        if fmt is not None and part == "weight":
            parts = fmt.stored_parts(self._leaves[module])
        else:
            parts = {"weight": self._leaves.pop(path)}
        parts = {name: array.reshape(-1, array.shape[-1]) if array.ndim else array for name, array in parts.items()}
        mx.eval(parts)
        self._held = (path, parts)
        return parts


def _decoded(parts: Mapping[str, mx.array], fmt: Format | None, start: int, stop: int, row_count: int) -> mx.array:
    """Rows ``start:stop`` of one expert in float32, of parts whose first axis is rows."""
    import mlx.core as mx

    if fmt is None:
        return parts["weight"][start:stop].astype(mx.float32)
    taken = {}
    for name, array in parts.items():
        if name == fmt.kind.tensor_scale:
            flat = array.reshape(-1)
            taken[name] = flat[start // row_count if flat.size > 1 else 0]
        else:
            taken[name] = array[start:stop]
    return fmt.decode(taken)


def _error(written: ModelSource, original: _Original, name: str, fmt: Format | None, rounded: bool) -> TensorError:
    """The error of one tensor of ``written``, in ``fmt`` where it is quantized; ``rounded`` to nearest where known."""
    import numpy as np

    spec = written.tensors[name]
    stored_as = f"{fmt.in_words()}, {'rounded' if rounded else 'chosen'}" if fmt else spec.dtype
    by_row = rounded or fmt is None
    sums, worst, worst_row = np.zeros(3), np.zeros(3), None
    # Experts have scales of their own.
    stacked = len(spec.shape) > 2 and (fmt is not None or name.rpartition(".")[0] in original.stored)
    whole = spec.shape[-2] if stacked else max(spec.rows, 1)
    for first in range(0, spec.rows if spec.size else 0, whole):
        for begin, end in row_blocks(TensorSpec(name, "F32", (whole, *spec.shape[-1:]))):
            start, stop = first + begin, first + end
            now = _written_rows(written, name, fmt, start, stop, whole)
            was = original.rows(name, start, stop, whole)
            found = _row_sums(was, now, _allowed(was, original, name, spec, fmt, rounded))
            sums += found.sum(axis=1)
            outside = np.flatnonzero(_outside(found))
            if worst_row is None and outside.size:
                worst_row, worst = start + int(outside[0]), found[:, outside[0]]
    within = worst_row is None if by_row else not _outside(sums)
    row = worst_row if by_row else None
    error, allowed, size = map(float, np.sqrt(sums if row is None else worst))
    return TensorError(name, stored_as, error / (size or 1.0), allowed / (size or 1.0), within, row)


def _outside(sums: Any) -> Any:
    """Whether an error is larger than is allowed, or than the numbers themselves; sums as of ``_row_sums``."""
    import numpy as np

    error, allowed, size = sums
    # No number is less than NaN, which lets nothing pass.
    return ~(error <= np.minimum(allowed, np.maximum(size, _LEAST_SCALE**2)))


def _row_sums(was: mx.array, now: mx.array, allowed: mx.array) -> Any:
    """Sums of squares over each row: of the error, of what is allowed, and of the numbers; (3, rows) float64."""
    import mlx.core as mx
    import numpy as np

    found = mx.stack([mx.square(x).sum(-1) for x in (now - was, mx.broadcast_to(allowed, was.shape), was)])
    return np.asarray(found).astype(np.float64)


def _written_rows(
    written: ModelSource, name: str, fmt: Format | None, start: int, stop: int, row_count: int
) -> mx.array:
    """Rows ``start:stop`` of a tensor of the folder, in float32."""
    import mlx.core as mx

    def read(tensor: str, first: int, last: int) -> mx.array:
        return to_mlx(written.read_rows(tensor, first, last), written.tensors[tensor].dtype)

    if fmt is None:
        return read(name, start, stop).astype(mx.float32)
    module = name.removesuffix(".weight")
    parts = {part: read(f"{module}.{part}", start, stop) for part in ("weight", *fmt.kind.beside)}
    scale = f"{module}.{fmt.kind.tensor_scale}"
    if fmt.kind.tensor_scale is not None and scale in written.tensors:
        numbers = read(scale, 0, max(written.tensors[scale].rows, 1)).reshape(-1)
        parts[fmt.kind.tensor_scale] = numbers[start // row_count if numbers.size > 1 else 0]
    return fmt.decode(parts)


def _allowed(
    was: mx.array, original: _Original, name: str, spec: TensorSpec, fmt: Format | None, rounded: bool
) -> mx.array:
    """What each element of ``was`` (rows, columns) may be off by, broadcastable to it (see the top of this file)."""
    import mlx.core as mx

    if fmt is not None:
        grouped = mx.abs(was).reshape(was.shape[0], -1, fmt.group_size).max(-1)
        share = (_ROUNDED if rounded else _CHOSEN) * fmt.steps(was) + 3 * _UNIT_ROUNDOFF["BF16"] * grouped
        return mx.repeat(share + _LEAST_SCALE, fmt.group_size, axis=-1)
    unit = _UNIT_ROUNDOFF.get(spec.dtype, 0.0)
    module = name.rpartition(".")[0]
    if module in original.stored:
        # MLX makes numbers of codes in the dtype of the scales.
        scales = original.specs[f"{module}.scales"].dtype
        unit = max(unit, _UNIT_ROUNDOFF.get(scales, 0.0))
        return 3 * unit * mx.abs(was).max(-1, keepdims=True) + _LEAST.get(spec.dtype, 0.0)
    source = original.specs[name].dtype
    as_wide = source == spec.dtype or source not in FLOAT_DTYPES or DTYPE_BITS[source] < DTYPE_BITS[spec.dtype]
    return mx.zeros_like(was) if as_wide else unit * mx.abs(was) + _LEAST.get(spec.dtype, 0.0)
