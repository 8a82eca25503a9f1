"""A model as the sequence of its blocks, each of which can be run alone on what the one before it gave.

The blocks are found through the module tree and checked by how the model calls them, never by names. Whatever
else a block is called with (masks, positions) is recorded from a run of the model in which each block hands its
input through, which costs no more than the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from mlxq.errors import MlxqError
from mlxq.machine.cores import blas_threads_shared, core_streams

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

T = TypeVar("T")
# handler(path, call, args, kwargs) stands in for a module's call; call(*args, **kwargs) is the module itself.
Handler = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class NotSequentialError(MlxqError):
    """The model does not run as one sequence of blocks, so it cannot be calibrated block by block."""


@contextmanager
def intercepted(modules: Mapping[str, nn.Module], handler: Handler) -> Iterator[None]:
    """Within the context, calls of ``modules`` (path -> module) go to ``handler``.

    So do calls of an embedding as a head (``as_linear``).

    Each module becomes an instance of a subclass of its own class: the module tree, attributes and isinstance
    checks stay as the model expects them.
    """
    classes = {path: type(module) for path, module in modules.items()}
    for path, module in modules.items():
        module.__class__ = _subclass(classes[path], path, handler)
    try:
        yield
    finally:
        for path, module in modules.items():
            module.__class__ = classes[path]


def _subclass(base: type[nn.Module], path: str, handler: Handler) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(path, partial(base.__call__, self), args, kwargs)

    def as_linear(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(path, partial(base.as_linear, self), args, kwargs)

    return type(
        base.__name__, (base,), {"__call__": call} | ({"as_linear": as_linear} if hasattr(base, "as_linear") else {})
    )


def side_by_side(call: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """``call(*each)`` for each of ``arguments``, evaluated: as many at a time as there are cores, each on a stream.

    MLX's CPU backend runs one operation of a stream at a time, and only its matrix products use several threads.
    """
    import mlx.core as mx

    streams = core_streams()
    for start in range(0, len(arguments), len(streams)):
        results = []
        together = arguments[start : start + len(streams)]
        with blas_threads_shared(len(together)):
            for stream, each in zip(streams, together, strict=False):
                with mx.stream(stream):
                    results.append(call(*each))
            mx.eval([_arrays(result) for result in results])
        yield from results


def _arrays(result: Any) -> list[Any]:
    """The arrays inside tuples, lists, dicts and dataclasses."""
    import mlx.core as mx

    if isinstance(result, mx.array):
        return [result]
    if isinstance(result, dict):
        return [array for value in result.values() for array in _arrays(value)]
    if isinstance(result, (tuple, list)):
        return [array for value in result for array in _arrays(value)]
    if hasattr(result, "__dataclass_fields__"):
        return [array for name in result.__dataclass_fields__ for array in _arrays(getattr(result, name))]
    return []


@dataclass(frozen=True)
class Entered:
    """What the model hands its blocks for one batch.

    ``hidden`` (sequences, length, width) goes into the first block; ``calls`` holds each block's further
    arguments; ``before`` the paths of modules called ahead of the first block.
    """

    hidden: mx.array
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    before: frozenset[str]


@dataclass(frozen=True)
class BlockSequence:
    """``model`` with its blocks in the order of their calls: path -> module."""

    model: nn.Module
    blocks: Mapping[str, nn.Module]

    def enter(self, tokens: mx.array) -> Entered:
        """Run everything ahead of the first block on ``tokens`` (sequences, length).

        Raises NotSequentialError where the blocks are not called once each, one on the output of another.
        """
        import mlx.core as mx

        first: list[mx.array] = []
        latest: list[mx.array] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        called: list[str] = []
        before: set[str] = set()
        outside = dict(outside_of(self.model, self.blocks))

        def note(path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not called:
                before.add(path)
            return call(*args, **kwargs)

        def hand_through(path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args or not isinstance(args[0], mx.array) or (latest and args[0] is not latest[-1]):
                raise NotSequentialError(
                    f"{path} is not called on the output of the block before it",
                    "this model can only be scored from its weights: calibration: none",
                )
            if not called:
                first.append(args[0])
            called.append(path)
            calls.append((args[1:], kwargs))
            # A new object for each block, so that the next call shows whose output it took.
            latest.append(args[0] + 0)
            return latest[-1]

        with intercepted(outside, note), intercepted(self.blocks, hand_through):
            self.model(tokens)
        if tuple(called) != tuple(self.blocks):
            raise NotSequentialError(
                f"{len(self.blocks)} blocks were found but the model made {len(called)} calls of them",
                "this model can only be scored from its weights: calibration: none",
            )
        if first[0].ndim != 3 or first[0].shape[:2] != tokens.shape:
            raise NotSequentialError(
                f"its blocks are given {first[0].shape} for {tokens.shape} tokens, and not a vector for each",
                "this model can only be scored from its weights: calibration: none",
            )
        return Entered(first[0], tuple(calls), frozenset(before))

    def run(self, index: int, hidden: mx.array, entered: Entered) -> mx.array:
        """Output of block ``index`` on ``hidden``, same shape."""
        import mlx.core as mx

        args, kwargs = entered.calls[index]
        path = tuple(self.blocks)[index]
        output = self.blocks[path](hidden, *args, **kwargs)
        if not isinstance(output, mx.array) or output.shape != hidden.shape:
            raise NotSequentialError(
                f"{path} returns something other than its input's successor",
                "this model can only be scored from its weights: calibration: none",
            )
        return output

    def run_all(self, index: int, hidden: Sequence[mx.array], entries: Sequence[Entered]) -> list[mx.array]:
        """Outputs of block ``index`` on each of ``hidden``, evaluated."""
        return list(side_by_side(self.run, [(index, *each) for each in zip(hidden, entries, strict=True)]))

    def leave(self, tokens: mx.array, hidden: mx.array) -> mx.array:
        """Logits (sequences, length, vocabulary) from ``hidden``, the last block's output."""

        def replaced(path: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return hidden

        with intercepted(self.blocks, replaced):
            output = self.model(tokens)
        logits: mx.array = getattr(output, "logits", output)
        return logits


def find_blocks(model: nn.Module) -> BlockSequence:
    """The outermost list of modules that holds the most parameters, taken for the model's blocks.

    Raises NotSequentialError where the model has no list of modules.
    """
    from mlx.utils import tree_flatten

    lists: list[tuple[int, str, list[Any]]] = []

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, list) and value and all(hasattr(item, "parameters") for item in value):
            size = sum(array.size for item in value for _, array in tree_flatten(item.parameters()))
            lists.append((size, prefix, value))
        elif isinstance(value, dict):
            for name, child in value.items():
                visit(f"{prefix}.{name}" if prefix else name, child)

    visit("", model)
    if not lists:
        raise NotSequentialError(
            "the model has no list of blocks", "this model can only be scored from its weights: calibration: none"
        )
    _, prefix, modules = max(lists, key=lambda entry: entry[0])
    return BlockSequence(model, {f"{prefix}.{index}": module for index, module in enumerate(modules)})


def quantizable(module: nn.Module) -> dict[str, nn.Module]:
    """Modules under ``module`` that MLX can quantize, by path from it."""
    return {path: child for path, child in module.named_modules() if hasattr(child, "to_quantized")}


def outside_of(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Quantizable modules of ``model`` that lie in none of ``blocks``."""
    prefixes = tuple(f"{path}." for path in blocks)
    return {path: child for path, child in quantizable(model).items() if not path.startswith(prefixes)}
