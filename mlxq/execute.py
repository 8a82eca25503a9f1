"""Stream a plan to disk: read, encode and write by blocks of rows, several at a time.

A tensor that maps straight through is cut into blocks of whole rows (affine and microscaling quantization are
row-wise, so blocks give the same bits as the whole). A tensor that ``sanitize`` assembles is made in one piece, one
at a time. Each worker reads, encodes and writes on an MLX stream of its own: arrays belong to the stream and thread
that made them. Every byte has its place before work begins, so workers need no order among themselves.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.architecture import open_lazily
from mlxq.errors import MlxqError
from mlxq.plan import Plan, Step
from mlxq.tensors import DTYPE_BITS, FLOAT_DTYPES, TensorSpec
from mlxq.writer import PartialFolder

if TYPE_CHECKING:
    import mlx.core as mx

# Source bytes a worker holds at a time: enough to keep disk and kernels busy, few enough to stay in reused memory.
BLOCK_BYTES = 4 << 20
# What MLX may keep of freed buffers while streaming.
CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Block:
    """Rows ``start:stop`` of a step's weight; an assembled step is one block."""

    step: Step
    start: int
    stop: int


@dataclass(frozen=True)
class Progress:
    """How far it is: bytes of output written of all to write, and the parameter just finished, if one was."""

    written_bytes: int
    total_bytes: int
    finished: str | None


def worker_count() -> int:
    """Workers that pay off: one per core up to 4 on a CPU, two on a GPU (one encodes while one moves bytes)."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.gpu):
        return 2
    return max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def blocks_of(step: Step) -> list[Block]:
    """Cut a step into blocks of whole rows of at most ``BLOCK_BYTES`` as stored."""
    rows = step.spec.rows
    if step.source is None or rows <= 1:
        return [Block(step, 0, rows)]
    row_bytes = max(1, step.spec.nbytes // rows)
    per_block = max(1, BLOCK_BYTES // row_bytes)
    return [Block(step, start, min(start + per_block, rows)) for start in range(0, rows, per_block)]


def execute(plan: Plan, folder: PartialFolder, *, trust_remote_code: bool = False) -> Iterator[Progress]:
    """Write every tensor of ``plan`` that the journal does not have, yielding progress.

    Raises MlxqError where a source cannot be read or the disk is full; finished steps stay in the journal.
    """
    import mlx.core as mx
    import mlx_lm.utils  # noqa: F401  (imported once here: workers must not race to import it)

    todo = [step for step in plan.steps if step.path not in folder.found.done]
    total = plan.weight_bytes
    written = total - sum(spec.nbytes for step in todo for spec in step.outputs)
    # Assembled steps first: they cannot be split, so they must not come last.
    blocks = [b for step in sorted(todo, key=lambda s: s.source is not None) for b in blocks_of(step)]
    remaining = Counter(block.step.path for block in blocks)
    waiting: queue.SimpleQueue[Block] = queue.SimpleQueue()
    for block in blocks:
        waiting.put(block)
    events: queue.SimpleQueue[tuple[Block, int] | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()
    assembling = threading.Lock()
    worker = _Worker(plan, folder, waiting, events, stop, assembling, trust_remote_code)
    previous_cache = mx.set_cache_limit(CACHE_BYTES)
    threads = [threading.Thread(target=worker.run, name=f"mlxq-{i}") for i in range(worker_count())]
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        yield Progress(written, total, None)
        while running:
            event = events.get()
            if event is None:
                running -= 1
            elif isinstance(event, BaseException):
                raise event
            else:
                block, nbytes = event
                written += nbytes
                remaining[block.step.path] -= 1
                done = remaining[block.step.path] == 0
                if done:
                    folder.finished(block.step.path)
                yield Progress(written, total, block.step.path if done else None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        mx.set_cache_limit(previous_cache)


class _Worker:
    """What every worker thread runs: take a block, encode it, write it, say so."""

    def __init__(
        self,
        plan: Plan,
        folder: PartialFolder,
        waiting: queue.SimpleQueue[Block],
        events: queue.SimpleQueue[tuple[Block, int] | BaseException | None],
        stop: threading.Event,
        assembling: threading.Lock,
        trust_remote_code: bool,
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.waiting = waiting
        self.events = events
        self.stop = stop
        self.assembling = assembling
        self.trust_remote_code = trust_remote_code
        self.places = {name: (shard.file, offset) for shard in plan.shards for name, offset in shard.offsets.items()}

    def run(self) -> None:
        import mlx.core as mx

        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                assembler: _Assembler | None = None
                while not self.stop.is_set():
                    try:
                        block = self.waiting.get_nowait()
                    except queue.Empty:
                        break
                    if block.step.source is None:
                        with self.assembling:
                            if assembler is None:
                                assembler = _Assembler(self.plan, trust_remote_code=self.trust_remote_code)
                            nbytes = self._write_assembled(assembler.take(block.step), block.step)
                    else:
                        nbytes = self._write_block(block)
                    self.events.put((block, nbytes))
            self.events.put(None)
        except BaseException as exc:
            self.events.put(_explained(exc))

    def _write_block(self, block: Block) -> int:
        import numpy as np

        step = block.step
        assert step.source is not None
        if step.repacked:
            parts = self.plan.source.read_repacked(step.source, block.start, block.stop)
            written = 0
            for spec in step.outputs:
                part = np.ascontiguousarray(parts[spec.name.rpartition(".")[2]])
                written += self._put(spec, part.data.cast("B"), block.start)
            return written
        rows = self.plan.source.read_rows(step.source, block.start, block.stop)
        stored = self.plan.source.tensors[step.source].dtype
        if step.format is None and stored == step.spec.dtype:
            return self._put(step.spec, np.ascontiguousarray(rows).data.cast("B"), block.start)
        return self._encode(to_mlx(rows, stored), step, block.start)

    def _write_assembled(self, whole: mx.array, step: Step) -> int:
        import mlx.core as mx

        mx.eval(whole)
        columns = step.spec.shape[-1] if step.spec.shape else 1
        matrix = whole.reshape(-1, columns)
        del whole
        per_block = max(1, BLOCK_BYTES // max(1, columns * matrix.dtype.size))
        written = 0
        for start in range(0, matrix.shape[0], per_block):
            if self.stop.is_set():
                break
            written += self._encode(matrix[start : start + per_block], step, start)
        return written

    def _encode(self, rows: mx.array, step: Step, start: int) -> int:
        """Cast ``rows`` (n, columns), quantize them where the step says so, write them from row ``start``."""
        import mlx.core as mx

        rows = rows.astype(getattr(mx, FLOAT_DTYPES[step.spec.dtype])) if step.spec.dtype in FLOAT_DTYPES else rows
        if step.format is None:
            return self._put(step.spec, as_bytes(rows), start)
        parts = mx.quantize(rows, group_size=step.format.group_size, bits=step.format.bits, mode=step.format.mode)
        mx.eval(*parts)
        return sum(self._put(spec, as_bytes(part), start) for spec, part in zip(step.outputs, parts, strict=True))

    def _put(self, spec: TensorSpec, data: memoryview, start_row: int) -> int:
        file, offset = self.places[spec.name]
        columns = spec.shape[-1] if spec.shape else 1
        self.folder.write(file, data, offset + start_row * columns * DTYPE_BITS[spec.dtype] // 8)
        return data.nbytes


class _Assembler:
    """Parameters that ``sanitize`` makes from several tensors, lazy until taken; each is let go once taken."""

    def __init__(self, plan: Plan, *, trust_remote_code: bool) -> None:
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        folder = plan.source.weights_folder
        assert folder is not None, "a plan assembles only from folders mlx_lm can open"
        model, _ = open_lazily(folder, plan.source.name, trust_remote_code=trust_remote_code)
        wanted = {step.path: step for step in plan.steps if step.source is None}
        leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
        self.arrays: dict[str, Any] = {}
        for path, array in tree_flatten(model.parameters()):
            step = wanted.get(path)
            if step is not None:
                self.arrays[path] = _numbers(leaves[path.rpartition(".")[0]], step) if step.dequantize else array

    def take(self, step: Step) -> mx.array:
        """Hand over a parameter, unevaluated."""
        array: mx.array = self.arrays.pop(step.path)
        return array


def _numbers(module: Any, step: Step) -> mx.array:
    """The weight a quantized module stands for, as numbers in the step's dtype."""
    import mlx.core as mx

    extra = {"global_scale": module["global_scale"]} if "global_scale" in module else {}
    return mx.dequantize(
        module["weight"],
        scales=module["scales"],
        biases=module.get("biases"),
        group_size=module.group_size,
        bits=module.bits,
        mode=getattr(module, "mode", "affine"),
        dtype=getattr(mx, FLOAT_DTYPES[step.spec.dtype]),
        **extra,
    )


def to_mlx(rows: Any, dtype: str) -> mx.array:
    """A numpy block as an MLX array of the stored dtype (BF16 comes as its 16 bits)."""
    import mlx.core as mx

    array = mx.array(rows)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def as_bytes(array: mx.array) -> memoryview:
    """The bytes of an array, row-major, without a copy where it is contiguous already."""
    import mlx.core as mx
    import numpy as np

    flat = mx.contiguous(array).reshape(-1)
    if flat.dtype == mx.bfloat16:
        flat = flat.view(mx.uint16)
    mx.eval(flat)
    return np.asarray(flat).data.cast("B")


def _explained(exc: BaseException) -> BaseException:
    if isinstance(exc, OSError) and not isinstance(exc, MlxqError):
        return MlxqError(f"cannot read {exc.filename or 'a weight file'}: {exc.strerror or exc}")
    return exc
