"""An ``mlx_lm`` model whose blocks come into memory, in fp32, only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.architecture import Architecture, open_lazily, openable_folder
from mlxq.arrays import to_mlx
from mlxq.calibration.blocks import BlockSequence, find_blocks
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
    folder: Path
    trust_remote_code: bool

    @contextmanager
    def hold(self, path: str) -> Iterator[None]:
        """A context in which the parameters of the module at ``path`` are in memory, in fp32."""
        from mlx.utils import tree_flatten

        unread = [(f"{path}.{name}", array) for name, array in tree_flatten(self.sequence.blocks[path].parameters())]
        self._load([name for name, _ in unread])
        try:
            yield
        finally:
            self._set(unread)

    @contextmanager
    def hold_all(self) -> Iterator[None]:
        """A context in which the whole model is in memory, in fp32."""
        unread = [(name, array) for path in self.sequence.blocks for name, array in self._of_block(path)]
        self._load([name for name, _ in unread])
        try:
            yield
        finally:
            self._set(unread)

    def _of_block(self, path: str) -> list[tuple[str, mx.array]]:
        from mlx.utils import tree_flatten

        return [(f"{path}.{name}", array) for name, array in tree_flatten(self.sequence.blocks[path].parameters())]

    def _load(self, names: list[str]) -> None:
        """Read parameters from the source; those that ``sanitize`` assembles, from a fresh lazy copy of the model."""
        from mlx.utils import tree_flatten

        wanted = set(names)
        loaded: list[tuple[str, mx.array]] = []
        assembled: set[str] = set()
        for parameter in self.architecture.parameters:
            name = parameter.spec.name
            if name not in wanted:
                continue
            if parameter.source is None:
                assembled.add(name)
                continue
            stored = self.source.tensors[parameter.source]
            rows = self.source.read_rows(parameter.source, 0, max(stored.rows, 1))
            loaded.append((name, to_mlx(rows, stored.dtype).reshape(parameter.spec.shape)))
        if assembled:
            model, _ = open_lazily(self.folder, self.source.name, trust_remote_code=self.trust_remote_code)
            loaded += [(name, array) for name, array in tree_flatten(model.parameters()) if name in assembled]
        self._set([(name, _in_fp32(array)) for name, array in loaded])

    def _set(self, arrays: list[tuple[str, mx.array]]) -> None:
        from mlx.utils import tree_unflatten

        self.sequence.model.update(tree_unflatten(arrays), strict=False)


def _in_fp32(array: mx.array) -> mx.array:
    import mlx.core as mx

    widened = array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
    # Evaluated one by one, so that one tensor at a time is held in both dtypes.
    mx.eval(widened)
    return widened


@contextmanager
def streamed_model(
    source: ModelSource, architecture: Architecture, *, trust_remote_code: bool = False
) -> Iterator[StreamedModel]:
    """Open ``source`` for calibration: its blocks unread, all else in memory.

    Raises BadInputError where its weights are stored quantized, NotSequentialError where it has no blocks.
    """
    from mlx.utils import tree_flatten

    if any(module.stored for module in architecture.modules):
        raise BadInputError(
            f"{source.name} is stored quantized, and calibration runs on plain weights",
            "Write it as numbers first: mlxq convert --dequantize; or use method: rtn.",
        )
    with openable_folder(source) as folder:
        model, _ = open_lazily(folder, source.name, trust_remote_code=trust_remote_code)
        streamed = StreamedModel(find_blocks(model), source, architecture, folder, trust_remote_code)
        inside = tuple(f"{path}." for path in streamed.sequence.blocks)
        streamed._load([name for name, _ in tree_flatten(model.parameters()) if not name.startswith(inside)])
        yield streamed
