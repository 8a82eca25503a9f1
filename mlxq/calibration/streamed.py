"""An ``mlx_lm`` model whose blocks come into memory, in fp32, only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxq.architecture.bind import Architecture
from mlxq.architecture.opening import opened_source
from mlxq.arrays import to_mlx
from mlxq.calibration.blocks import BlockSequence, NotSequentialError, find_blocks
from mlxq.errors import BadInputError
from mlxq.sources.base import ModelSource

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class StreamedModel:
    """``sequence.model`` holds in memory what lies outside its blocks; ``hold(path)`` brings in a block.

    Arrays belong to the thread that opened it.
    """

    sequence: BlockSequence
    source: ModelSource
    architecture: Architecture

    @contextmanager
    def hold(self, path: str) -> Iterator[None]:
        """A context in which the parameters of the block at ``path`` are in memory, in fp32."""
        with self._held(self._of_block(path)):
            yield

    @contextmanager
    def hold_all(self) -> Iterator[None]:
        """A context in which the whole model is in memory, in fp32."""
        with self._held([item for path in self.sequence.blocks for item in self._of_block(path)]):
            yield

    def _of_block(self, path: str) -> list[tuple[str, mx.array]]:
        from mlx.utils import tree_flatten

        return [(f"{path}.{name}", array) for name, array in tree_flatten(self.sequence.blocks[path].parameters())]

    @contextmanager
    def _held(self, unread: list[tuple[str, mx.array]]) -> Iterator[None]:
        self.load({name for name, _ in unread})
        try:
            yield
        finally:
            self._set(unread)

    def load(self, names: set[str]) -> None:
        """Bring parameters into memory, in fp32."""
        self._set(list(read_parameters(self.source, self.architecture, names)))

    def _set(self, arrays: list[tuple[str, mx.array]]) -> None:
        from mlx.utils import tree_unflatten

        self.sequence.model.update(tree_unflatten(arrays), strict=False)


def read_parameters(source: ModelSource, architecture: Architecture, names: set[str]) -> Iterator[tuple[str, mx.array]]:
    """Parameters of the MLX model by path, in fp32, read one at a time.

    Those that ``sanitize`` assembles come from a lazy copy of the model of their own, which goes with them.
    """
    from mlx.utils import tree_flatten

    assembled: set[str] = set()
    for parameter in architecture.parameters:
        name = parameter.spec.name
        if name in names and parameter.source is not None:
            stored = source.tensors[parameter.source]
            rows = source.read_rows(parameter.source, 0, max(stored.rows, 1))
            yield name, _in_fp32(to_mlx(rows, stored.dtype).reshape(parameter.spec.shape))
        elif name in names:
            assembled.add(name)
    if assembled:
        with opened_source(source) as (model, _):
            lazy = {name: array for name, array in tree_flatten(model.parameters()) if name in assembled}
            del model
            for name in list(lazy):
                yield name, _in_fp32(lazy.pop(name))


def not_sequential(source: ModelSource) -> str | None:
    """Why calibration cannot follow this model block by block, or None where it can. Computes nothing."""
    import mlx.core as mx

    try:
        with opened_source(source) as (model, _):
            sequence = find_blocks(model)
            # Nothing is evaluated: what is checked is who calls whom on what.
            try:
                entered = sequence.enter(mx.zeros((1, 8), dtype=mx.int32))
                hidden = entered.hidden
                for index in range(len(sequence.blocks)):
                    hidden = sequence.run(index, hidden, entered)
            except (ValueError, TypeError, AttributeError, LookupError) as exc:
                # Blocks that return more than their output, or share what another computed, fail in the model's code.
                return f"its blocks do not take one another's outputs alone ({exc})"
    except NotSequentialError as exc:
        return exc.message
    return None


def _in_fp32(array: mx.array) -> mx.array:
    import mlx.core as mx

    widened = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    # Evaluated one by one, so that one tensor at a time is held in both dtypes.
    mx.eval(widened)
    return widened


@contextmanager
def streamed_model(source: ModelSource, architecture: Architecture) -> Iterator[StreamedModel]:
    """Open ``source`` for calibration: its blocks unread, all else in memory.

    Raises BadInputError where its weights are stored quantized, NotSequentialError where it has no blocks.
    """
    from mlx.utils import tree_flatten

    if any(module.stored for module in architecture.modules):
        raise BadInputError(
            f"{source.name} is stored quantized, and calibration runs on plain weights",
            "Write it as numbers first: mlxq convert --dequantize; or use method: rtn.",
        )
    with opened_source(source) as (model, _):
        streamed = StreamedModel(find_blocks(model), source, architecture)
        inside = tuple(f"{path}." for path in streamed.sequence.blocks)
        streamed.load({name for name, _ in tree_flatten(model.parameters()) if not name.startswith(inside)})
        yield streamed
