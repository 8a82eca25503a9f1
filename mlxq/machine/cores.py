"""Every core busy: MLX's CPU backend uses several threads in matrix products alone, all else is one thread a stream."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx

# Tokens of one sequence batch that a core takes at a time: its attention scores then stay near its cache.
_TOKENS_PER_STREAM = 512


def on_cpu() -> bool:
    """Whether MLX computes on a CPU here."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


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
