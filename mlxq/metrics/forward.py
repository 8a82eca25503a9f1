"""Running a model over text for measurement: fp32 products, bounded memory, every core busy.

MLX's CPU backend multiplies bf16 and quantized matrices at 2 to 7 GFLOP/s and fp32 ones at the speed of the
BLAS, so on a CPU every matrix is dequantized to fp32 first. On a GPU the packed weights stay as they are,
with scales, biases and activations in fp32: the quantized kernels then compute in fp32.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxq import upstream
from mlxq.errors import MlxqError
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

# Tokens of one sequence batch that a core takes at a time: its attention scores then stay near its cache.
_TOKENS_PER_STREAM = 512


def on_cpu() -> bool:
    """Whether MLX computes on a CPU here."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def evaluation_model(model: nn.Module, *, own_dtype: bool = False, resident: bool | None = None) -> nn.Module:
    """Make ``model`` compute in fp32 on the numbers its weights stand for. Changes it in place.

    ``own_dtype`` keeps activations in the dtype the model was stored in, and only accumulates products in
    fp32: what an unquantized model's own kernels do, at the speed of fp32 (used for the noise floor).
    ``resident`` says whether the fp32 matrices stay in memory or are made again at each call; by default they
    stay where they take less than half of the free memory. Raises MlxqError for a quantized module of a kind
    unknown here.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map_with_path

    if not on_cpu():
        if not own_dtype:
            model.set_dtype(mx.float32)
        return model
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    if resident is None:
        from mlxq.machine.runtime import free_memory_bytes

        resident = sum(_fp32_bytes(leaf) for _, leaf in leaves) < free_memory_bytes() // 2
    dtype = None if own_dtype else mx.float32
    replace = functools.partial(_with_fp32_products, resident=resident, dtype=dtype)
    model.update_modules(tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module))
    if not own_dtype:
        model.set_dtype(mx.float32)
    return model


def _fp32_bytes(leaf: nn.Module) -> int:
    if "weight" not in leaf:
        return 0
    fmt = Format.of_module(leaf)
    packed = leaf["weight"]
    return int(packed.size // packed.shape[-1] * fmt.logical_columns(packed.shape[-1]) if fmt else packed.size) * 4


def _with_fp32_products(path: str, leaf: nn.Module, *, resident: bool, dtype: mx.Dtype | None) -> nn.Module:
    """The fp32 counterpart of a module that multiplies by a matrix; any other module as it is.

    ``dtype`` is what an embedding gives, None for the one it is stored in.
    """
    kinds = _replacements()
    for kind, replacement in kinds.items():
        if type(leaf) is kind:
            return replacement(leaf, resident, dtype)
    if Format.of_module(leaf):
        raise MlxqError(f"{path}: cannot dequantize a {type(leaf).__name__} for evaluation")
    return leaf


@functools.cache
def _replacements() -> dict[type, Callable[[nn.Module, bool, mx.Dtype | None], nn.Module]]:
    """MLX's matrix modules, quantized and not -> what stands in for them."""
    import mlx.core as mx
    import mlx.nn as nn

    class Matrix(nn.Module):  # type: ignore[misc]
        """A weight (..., rows, columns) that multiplies in fp32, whatever it is stored as.

        Products come back in the dtype of the activations that went in.
        """

        def __init__(self, stored: nn.Module, resident: bool, dtype: mx.Dtype | None) -> None:
            super().__init__()
            self._format = Format.of_module(stored)
            self._stored = self._format.stored_parts(stored) if self._format else {"weight": stored["weight"]}
            computed = self._stored.get("scales", self._stored["weight"]).dtype
            own = computed if mx.issubdtype(computed, mx.floating) else mx.bfloat16
            self._dtype = dtype or own
            if stored.get("bias") is not None:
                self.bias = stored["bias"]
            if resident:
                fp32 = self.rows(slice(None))
                mx.eval(fp32)
                self._stored, self._format = {"weight": fp32}, None

        def rows(self, index: Any) -> mx.array:
            """Rows of the weight in fp32; scales and biases are widened first, so nothing is rounded on the
            way.
            """
            if self._format is None:
                plain: mx.array = self._stored["weight"][index]
                return plain.astype(mx.float32)
            return self._format.decode(self._format.rows(self._stored, index))

        @property
        def weight(self) -> mx.array:
            return self.rows(slice(None))

    class Linear(Matrix):
        def __call__(self, x: mx.array) -> mx.array:
            y = (x.astype(mx.float32) @ self.weight.T).astype(x.dtype)
            return y + self.bias if "bias" in self else y

    class Embedding(Matrix):
        def __call__(self, ids: mx.array) -> mx.array:
            return self.rows(ids).astype(self._dtype)

        def as_linear(self, x: mx.array) -> mx.array:
            return (x.astype(mx.float32) @ self.weight.T).astype(x.dtype)

    class SwitchLinear(Matrix):
        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            y = mx.gather_mm(
                x.astype(mx.float32),
                self.weight.swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            ).astype(x.dtype)
            return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y

    class MultiLinear(Matrix):
        def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
            weight = self.weight.swapaxes(-1, -2) if transpose else self.weight
            return (x.astype(mx.float32) @ weight).astype(x.dtype)

    return {
        nn.Linear: Linear,
        nn.QuantizedLinear: Linear,
        nn.Embedding: Embedding,
        nn.QuantizedEmbedding: Embedding,
        **dict.fromkeys(upstream.switch_linears(), SwitchLinear),
        **dict.fromkeys(upstream.multi_linears(), MultiLinear),
    }


def batch_size(sequence_tokens: int, vocabulary: int, free_bytes: int) -> int:
    """Sequences to run at once: enough to keep every core busy, few enough that their logits fit.

    A token's logits are held about four times over (two models, each with one working copy), in at most a
    quarter of what is free.
    """
    fits = free_bytes // 4 // (sequence_tokens * vocabulary * 4 * 4)
    wanted = len(core_streams()) * max(1, _TOKENS_PER_STREAM // sequence_tokens) if on_cpu() else 8
    return int(max(1, min(fits, wanted)))


def core_streams() -> tuple[Any, ...]:
    """One CPU stream per core, the thread's own. Only MLX's matrix products use several threads, all else is one
    per stream. On a GPU, its default stream.
    """
    import mlx.core as mx

    if not on_cpu():
        return (mx.default_stream(mx.default_device()),)
    return _cpu_streams(threading.get_ident())


@functools.cache
def _cpu_streams(thread: int) -> tuple[Any, ...]:
    import mlx.core as mx

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tuple(mx.new_stream(mx.cpu) for _ in range(cores))


@contextmanager
def blas_threads_shared(streams: int) -> Iterator[None]:
    """Within the context each of ``streams`` has its share of OpenBLAS's threads, where OpenBLAS multiplies."""
    set_threads = _openblas_setter() if on_cpu() else None
    if set_threads is None:
        yield
        return
    cores = len(core_streams())
    set_threads(max(1, cores // streams))
    try:
        yield
    finally:
        set_threads(cores)


@functools.cache
def _openblas_setter() -> Any:
    return getattr(ctypes.CDLL(None), "openblas_set_num_threads", None) if os.name == "posix" else None


def run_rows(call: Callable[[Any], mx.array], rows: Any) -> mx.array:
    """``call`` on each share of ``rows`` (sequences first), the shares side by side on all cores; joined,
    evaluated.
    """
    import mlx.core as mx

    count = min(len(core_streams()), rows.shape[0])
    bounds = [rows.shape[0] * i // count for i in range(count + 1)]
    results = []
    with blas_threads_shared(count):
        for stream, start, stop in zip(core_streams(), bounds, bounds[1:], strict=False):
            with mx.stream(stream):
                results.append(call(rows[start:stop]))
        mx.eval(results)
    joined = mx.concatenate(results) if count > 1 else results[0]
    mx.eval(joined)
    return joined


def on_row_shares(call: Callable[[mx.array], mx.array], matrix: mx.array) -> mx.array:
    """``call`` on a share of the rows of ``matrix`` (rows, columns) for each core, in threads; joined, evaluated.

    For calls that evaluate as they go, which a second stream of one thread cannot overlap. ``matrix`` and what
    ``call`` holds must be evaluated. A stack of matrices goes in one piece.
    """
    import mlx.core as mx

    cores = len(core_streams())
    if cores == 1 or matrix.ndim != 2 or matrix.shape[0] < 2 * cores:
        return call(matrix)
    bounds = [matrix.shape[0] * i // cores for i in range(cores + 1)]

    def share(start: int, stop: int) -> mx.array:
        with mx.stream(core_streams()[0]):
            result = call(matrix[start:stop])
            mx.eval(result)
            return result

    with blas_threads_shared(cores):
        return mx.concatenate(list(_pool(cores).map(share, bounds, bounds[1:])))


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


def find_body(model: nn.Module) -> tuple[nn.Module, str] | None:
    """Where the decoder layers hang: (parent, name of the child that holds ``model.layers``), or None.

    What the parent does after calling that child is the head: projection to the vocabulary, scaling, capping.
    """
    import mlx.nn as nn

    layers = getattr(model, "layers", None)
    if not layers:
        return None
    modules = dict(model.named_modules())
    for path, module in modules.items():
        held = (child for child in module.values() if isinstance(child, list))
        if path and any(child and child[0] is layers[0] for child in held):
            parent, _, name = path.rpartition(".")
            return (modules[parent], name) if isinstance(modules.get(parent), nn.Module) else None
    return None


@functools.cache
def _stored_body() -> type:
    import mlx.nn as nn

    class StoredBody(nn.Module):  # type: ignore[misc]
        """Stands where the decoder was and answers with final hidden states computed earlier.

        Keeps the body's other children, as a tied head multiplies by the embedding.
        """

        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            for name, child in body.items():
                if not isinstance(child, list):
                    self[name] = child
            for name, value in vars(body).items():
                if not name.startswith("_"):
                    setattr(self, name, value)
            self._answers: list[Any] = []

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._answers[0]

    return StoredBody


class Reference:
    """The reference over the text: its final hidden states, and its head to turn them into logits.

    After ``build`` the decoder's weights are gone: what stays is one fp32 vector per token and the head.
    ``hidden`` is None where the model cannot be split; then the whole model stays and is run again.
    """

    def __init__(self, model: nn.Module, hidden: list[Any] | None) -> None:
        self._model = model
        self._hidden = hidden

    @property
    def is_split(self) -> bool:
        """Whether only hidden states and the head are held."""
        return self._hidden is not None

    def logits(self, batch: int, tokens: mx.array) -> mx.array:
        """fp32 logits (sequences, tokens, vocabulary) of batch ``batch``, whose input was ``tokens``."""
        if self._hidden is None:
            return run_rows(lambda rows: _logits(self._model, rows), tokens)
        import mlx.core as mx

        return _head_logits(self._model, mx.array(self._hidden[batch]), tokens)


def _logits(model: nn.Module, tokens: mx.array) -> mx.array:
    import mlx.core as mx

    logits: mx.array = model(tokens)
    return logits.astype(mx.float32)


def _head_logits(model: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    import mlx.core as mx

    found = find_stored(model)

    def call(index: mx.array) -> mx.array:
        found._answers[:] = [hidden[index]]
        return _logits(model, tokens[index])

    return run_rows(call, mx.arange(tokens.shape[0]))


def find_stored(model: nn.Module) -> Any:
    """The stand-in for the decoder inside a split model."""
    return next(module for _, module in model.named_modules() if type(module) is _stored_body())


def build_reference(model: nn.Module, batches: Sequence[mx.array]) -> Generator[int, None, Reference]:
    """Run the reference over ``batches`` of tokens (sequences, length) and keep what later comparisons need.

    Yields the tokens of each finished batch and returns the Reference.
    The model is split only if head and stored hidden states give its own logits back, tried on the first
    batch.
    """
    import mlx.core as mx
    import numpy as np

    found = find_body(model)
    if found is None:
        return Reference(model, None)
    parent, name = found
    body = parent[name]
    stand_in = _stored_body()(body)

    def run(rows: mx.array) -> mx.array:
        hidden: mx.array = body(rows)
        return hidden.astype(mx.float32)

    def splits(tokens: mx.array) -> bool:
        whole = _logits(model, tokens)
        try:
            stand_in._answers[:] = [run(tokens)]
            parent[name] = stand_in
            same = bool(mx.array_equal(whole, _logits(model, tokens)).item())
        except Exception:  # a body with its own calling convention: not an error, only not splittable
            same = False
        parent[name] = body
        return same

    if not splits(batches[0][:1, :16]):
        return Reference(model, None)
    hidden = []
    for tokens in batches:
        hidden.append(np.asarray(run_rows(run, tokens)))
        yield tokens.size
    parent[name] = stand_in
    return Reference(model, hidden)
