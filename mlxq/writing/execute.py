"""Stream a plan to disk: read, encode and write by blocks of rows, several at a time.

A tensor that maps straight through is cut into blocks of whole rows (every encoding here is row-wise, so blocks give
the same bits as the whole) that workers read, encode and write. A tensor that ``sanitize`` assembles, or that is
stored quantized, is brought into memory by one thread, one at a time, and the same workers encode its rows. Each
thread has an MLX stream of its own: arrays belong to the stream and thread that made them, so rows pass between
threads as numpy arrays. Every byte has its place before work begins, so workers need no order among themselves.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlxq import upstream
from mlxq.architecture.opening import open_lazily
from mlxq.arrays import all_finite, as_bytes, as_matrix, rows_finite, to_mlx
from mlxq.calibration.guided import guided_weights
from mlxq.errors import MlxqError
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide
from mlxq.methods.registry import named
from mlxq.planning.plan import Plan, Step
from mlxq.tensors import DTYPE_BITS, FLOAT_DTYPES, TensorSpec
from mlxq.writing.folder import PartialFolder
from mlxq.writing.numbers import damaged, encoded_whole, spoilt

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy.typing as npt

# Source bytes a worker holds at a time: enough to keep disk and kernels busy, few enough to stay in reused memory.
BLOCK_BYTES = 4 << 20
# What MLX may keep of freed buffers while streaming.
CACHE_BYTES = 64 << 20
# How often an idle worker looks whether a tensor has been assembled or the run has ended.
IDLE_S = 0.05


@dataclass(frozen=True)
class Held:
    """A step's arrays in memory, each as a matrix of rows: a weight, and what lies beside it where it is quantized.

    ``dtypes`` are the arrays' own (numpy has no BF16); ``stored`` says how to read a quantized weight; ``guide`` is
    what calibration says of it.
    """

    rows: Mapping[str, npt.NDArray[Any]]
    dtypes: Mapping[str, str]
    stored: Format | None
    guide: Guide | None


@dataclass(frozen=True)
class Block:
    """Rows ``start:stop`` of a step's weight, read from the source, or from memory where it is ``held``."""

    step: Step
    start: int
    stop: int
    held: Held | None = None


@dataclass(frozen=True)
class Written:
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
    """Cut a step into blocks of whole rows of at most ``BLOCK_BYTES`` as numbers."""
    rows = max(step.spec.rows, 1)
    per_block = max(1, BLOCK_BYTES // max(1, step.spec.nbytes // rows))
    if step.format is not None:
        method = named(step.method, step.format)
        per_block = max(per_block, method.least_rows(step.spec.shape[-1])) if method.rows_independent else rows
    # Each expert of a stack has a guide, and where it is stored quantized a scale, of its own.
    whole = step.spec.shape[-2] if step.guided or step.dequantize else rows
    return [
        Block(step, first + start, first + min(start + per_block, whole))
        for first in range(0, rows, whole)
        for start in range(0, whole, per_block)
    ]


def execute(plan: Plan, folder: PartialFolder, *, steps: Sequence[Step] | None = None) -> Iterator[Written]:
    """Write every tensor of ``plan``, or of some ``steps`` of it, that the journal does not have, yielding progress.

    Raises MlxqError where a source cannot be read or the disk is full; finished steps stay in the journal.
    """
    import mlx.core as mx

    assert plan.source.remote is None, "the weights are still on the Hub"
    # Imports mlx_lm, once and here: threads must not race to import it.
    upstream.default_classes()
    todo = [step for step in steps or plan.steps if step.path not in folder.done]
    total = plan.weight_bytes
    written = sum(spec.nbytes for step in plan.steps if step.path in folder.done for spec in step.outputs)
    remaining = Counter({step.path: len(blocks_of(step)) for step in todo})
    work = _Work(plan, folder, todo)
    previous_cache = mx.set_cache_limit(CACHE_BYTES)
    threads = [threading.Thread(target=work.encode_all, name=f"mlxq-{i}") for i in range(worker_count())]
    threads.append(threading.Thread(target=work.assemble_all, name="mlxq-assembler"))
    for thread in threads:
        thread.start()
    running = len(threads)
    try:
        yield Written(written, total, None)
        while running:
            event = work.events.get()
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
                    if block.held is not None:
                        work.vacant.release()
                yield Written(written, total, block.step.path if done else None)
    finally:
        work.stop.set()
        work.vacant.release()
        for thread in threads:
            thread.join()
        mx.set_cache_limit(previous_cache)


class _Work:
    """What the threads share: the blocks to encode, where their bytes go, and the events they report."""

    def __init__(self, plan: Plan, folder: PartialFolder, todo: list[Step]) -> None:
        self.plan = plan
        self.folder = folder
        self.guided = [step for step in todo if step.guided]
        self.to_assemble = [step for step in todo if step.source is None and not step.guided]
        self.straight: queue.SimpleQueue[Block] = queue.SimpleQueue()
        for step in todo:
            if step.source is not None and not step.guided:
                for block in blocks_of(step):
                    self.straight.put(block)
        self.assembled: queue.SimpleQueue[Block] = queue.SimpleQueue()
        self.all_assembled = threading.Event()
        self.vacant = threading.Semaphore(1)
        self.events: queue.SimpleQueue[tuple[Block, int] | BaseException | None] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.places = {name: (shard.file, offset) for shard in plan.shards for name, offset in shard.offsets.items()}

    def assemble_all(self) -> None:
        """Bring the tensors that no file holds as they are into memory, each once there is room for it."""
        import mlx.core as mx

        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                for step, held in self._held_steps():
                    for block in blocks_of(step):
                        self.assembled.put(replace(block, held=held))
                    del held
            self.all_assembled.set()
            self.events.put(None)
        except BaseException as exc:
            self.events.put(_explained(exc))

    def _held_steps(self) -> Iterator[tuple[Step, Held]]:
        """Assembled steps, then those that calibration guides, each when the one before has been written."""
        if self.to_assemble:
            assembler = _Assembler(self.plan, self.to_assemble)
            for step in self.to_assemble:
                if not self._is_vacant():
                    return
                yield step, assembler.take(step)
        if self.guided:
            steps = {step.path: step for step in self.guided}
            encoders = {s.path: (named(s.method, s.format), s.format) for s in self.guided if s.format}
            for path, weight, guide in guided_weights(self.plan, encoders):
                if not self._is_vacant():
                    return
                yield steps[path], Held({"weight": as_matrix(weight)}, {"weight": "F32"}, None, guide)

    def _is_vacant(self) -> bool:
        """Wait until the tensor in memory is written; False where the run was stopped."""
        self.vacant.acquire()
        return not self.stop.is_set()

    def encode_all(self) -> None:
        """Take a block, encode it, write it, say so, until there are no more."""
        import mlx.core as mx

        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                while not self.stop.is_set():
                    block = self._next()
                    if block is None:
                        break
                    self.events.put((block, self._write(block)))
            self.events.put(None)
        except BaseException as exc:
            self.events.put(_explained(exc))

    def _next(self) -> Block | None:
        """A block of what is in memory, else of what is to be read; None when all is taken."""
        while not self.stop.is_set():
            ended = self.all_assembled.is_set()
            for waiting in (self.assembled, self.straight):
                try:
                    return waiting.get_nowait()
                except queue.Empty:
                    continue
            if ended:
                return None
            self.stop.wait(IDLE_S)
        return None

    def _write(self, block: Block) -> int:
        """Encode and write a block; returns the bytes written."""
        import numpy as np

        step = block.step
        if block.held is not None:
            return self._encode(block, _held_rows(block.held, block))
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
            rows = np.ascontiguousarray(rows)
            if not rows_finite(rows, stored) and (error := damaged(step.spec, rows, stored, block.start)):
                raise error
            return self._put(step.spec, rows.data.cast("B"), block.start)
        return self._encode(block, to_mlx(rows, stored))

    def _as_read(self, block: Block) -> mx.array:
        """A block's rows in float32, before anything is done to them: for an error to say what was."""
        import mlx.core as mx

        step = block.step
        if block.held is not None:
            return _held_rows(block.held, block, exactly=True).astype(mx.float32)
        assert step.source is not None
        stored = self.plan.source.tensors[step.source].dtype
        rows = self.plan.source.read_rows(step.source, block.start, block.stop)
        return to_mlx(rows, stored).astype(mx.float32)

    def _encode(self, block: Block, rows: mx.array) -> int:
        """Cast ``rows`` (n, columns) of a block, quantize them where its step says so, and write them.

        Raises MlxqError where they are no numbers, or would be none when cast or quantized.
        """
        import mlx.core as mx

        step = block.step
        if step.spec.dtype not in FLOAT_DTYPES or not rows.size:
            return self._put(step.spec, as_bytes(rows), block.start)
        rows = rows.astype(getattr(mx, FLOAT_DTYPES[step.spec.dtype]))
        parts, whole = {"weight": rows}, all_finite(rows)
        if step.format is not None:
            guide = _guide_of(block) or Guide()
            parts = named(step.method, step.format).encode(rows, step.format, guide).arrays()
            # Most encoders make ordinary numbers of NaN, and the damage would not show.
            whole = whole & encoded_whole(step.format, parts)
        mx.eval(parts, whole)
        if not whole.item() and (error := spoilt(step, self._as_read(block), rows, parts, block.start)):
            raise error
        if step.format is None:
            return self._put(step.spec, as_bytes(rows), block.start)
        return sum(self._put(spec, as_bytes(parts[spec.name.rpartition(".")[2]]), block.start) for spec in step.outputs)

    def _put(self, spec: TensorSpec, data: memoryview, start_row: int) -> int:
        file, offset = self.places[spec.name]
        columns = spec.shape[-1] if spec.shape else 1
        self.folder.write(file, data, offset + start_row * columns * DTYPE_BITS[spec.dtype] // 8)
        return data.nbytes


class _Assembler:
    """Parameters that ``sanitize`` makes from several tensors, lazy until taken; each is let go once taken."""

    def __init__(self, plan: Plan, steps: list[Step]) -> None:
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        folder = plan.source.weights_folder
        assert folder is not None, "a plan assembles only from folders mlx_lm can open"
        model, _ = open_lazily(folder, plan.source.name, trusted=plan.source.trusted)
        wanted = {step.path: step for step in steps}
        leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
        self.arrays: dict[str, dict[str, mx.array]] = {}
        self.stored: dict[str, Format] = {}
        for path, array in tree_flatten(model.parameters()):
            if path not in wanted:
                continue
            self.arrays[path] = {"weight": array}
            leaf = leaves[path.rpartition(".")[0]] if wanted[path].dequantize else None
            if leaf is not None and (fmt := Format.of_module(leaf)):
                self.arrays[path] = fmt.stored_parts(leaf)
                self.stored[path] = fmt

    def take(self, step: Step) -> Held:
        """Evaluate a parameter and hand it over."""
        import mlx.core as mx

        arrays = self.arrays.pop(step.path)
        mx.eval(list(arrays.values()))
        dtypes = {name: "BF16" if array.dtype == mx.bfloat16 else "" for name, array in arrays.items()}
        rows = {name: as_matrix(arrays.pop(name)) for name in list(arrays)}
        return Held(rows, dtypes, self.stored.get(step.path), None)


def _guide_of(block: Block) -> Guide | None:
    """A block's guide: that of its expert where the step is a stack of them."""
    guide = block.held.guide if block.held else None
    if guide is None or len(block.step.spec.shape) < 3:
        return guide
    return guide.of_expert(block.start // block.step.spec.shape[-2])


def _held_rows(held: Held, block: Block, *, exactly: bool = False) -> mx.array:
    """A block's rows as numbers, where they are stored quantized in the step's dtype, or ``exactly`` in float32."""
    import mlx.core as mx

    if held.stored is None:
        return to_mlx(held.rows["weight"][block.start : block.stop], held.dtypes["weight"])
    parts = {}
    for name, array in held.rows.items():
        if name == held.stored.kind.tensor_scale:
            # One number for the tensor, or one for each expert of a stack.
            expert = block.start // block.step.spec.shape[-2] if array.size > 1 else 0
            parts[name] = to_mlx(array.reshape(-1)[expert], held.dtypes[name])
        else:
            parts[name] = to_mlx(array[block.start : block.stop], held.dtypes[name])
    if exactly:
        return held.stored.decode(parts)
    return held.stored.dequantize(parts, getattr(mx, FLOAT_DTYPES[block.step.spec.dtype]))


def _explained(exc: BaseException) -> BaseException:
    if isinstance(exc, OSError) and not isinstance(exc, MlxqError):
        return MlxqError(f"cannot read {exc.filename or 'a weight file'}: {exc.strerror or exc}")
    return exc
