"""What calibration text says of each module's inputs: second moments, by expert where there are experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlxq.calibration.blocks import BlockSequence, intercepted, outside_of, quantizable, side_by_side

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

# An expert's statistics count as if this many tokens of the average expert had been seen besides its own.
EXPERT_FLOOR_TOKENS = 64
# hold(path): a context in which the weights of the block at ``path`` are in memory. Those outside blocks always are.
Hold = Callable[[str], AbstractContextManager[Any]]


def always_held(path: str) -> AbstractContextManager[Any]:
    """The ``hold`` of a model that is in memory whole."""
    return nullcontext()


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a module's inputs x over ``tokens`` tokens.

    ``second_moment`` (..., columns) float32 is the mean of each input squared and ``hessian``
    (..., columns, columns), where it was asked for, the mean of x xᵀ; with a leading axis of experts for a stack.
    """

    second_moment: mx.array
    hessian: mx.array | None
    tokens: int


@dataclass(frozen=True)
class ModuleInput:
    """One call of a module: ``x`` and, for a stack of experts, ``indices``: the expert of each row of output."""

    x: mx.array
    indices: mx.array | None

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> ModuleInput:
        """From the arguments of ``Linear`` (x) or ``SwitchLinear`` (x, indices, ...)."""
        import mlx.core as mx

        return cls(args[0], args[1] if len(args) > 1 and isinstance(args[1], mx.array) else None)


def gather(inputs: Sequence[ModuleInput], module: nn.Module, *, hessian: bool = True) -> InputStatistics | None:
    """Statistics of ``module`` over its calls, by expert where it stacks experts.

    None where the calls do not say what its columns multiply: there are none, or it stacks matrices that are not
    chosen by index (multi-head latent attention has one for each head, and multiplies by it from either side).
    """
    import mlx.core as mx

    experts = _stacked(module)
    if not inputs or (experts is not None and any(call.indices is None for call in inputs)):
        return None
    total = _moments(inputs[0], experts, hessian)
    for call in inputs[1:]:
        total = total + _moments(call, experts, hessian)
        mx.eval(total)
    if experts is None:
        tokens = sum(call.x.size // call.x.shape[-1] for call in inputs)
        mean = total / tokens
    else:
        counts = mx.zeros(experts)
        for call in inputs:
            if call.indices is not None:
                counts = counts + (call.indices.reshape(-1, 1) == mx.arange(experts)).astype(mx.float32).sum(axis=0)
        tokens = int(float(counts.sum()))
        typical = total.sum(axis=0) / max(tokens, 1)
        weights = (counts + EXPERT_FLOOR_TOKENS).reshape(-1, *[1] * (total.ndim - 1))
        mean = (total + EXPERT_FLOOR_TOKENS * typical) / weights
    if not hessian:
        return InputStatistics(mean, None, tokens)
    return InputStatistics(mx.diagonal(mean, axis1=-2, axis2=-1), mean, tokens)


def _moments(call: ModuleInput, experts: int | None, hessian: bool) -> mx.array:
    """Sum over a call's tokens of x xᵀ, or of x squared: (columns, columns) or (columns,), experts first."""
    import mlx.core as mx

    rows = call.x.reshape(-1, call.x.shape[-1]).astype(mx.float32)
    if experts is None or call.indices is None:
        return rows.T @ rows if hessian else (rows * rows).sum(axis=0)
    indices = call.indices.reshape(-1)
    # One token may be given once for all the experts that it goes to.
    repeated = mx.repeat(rows, indices.size // rows.shape[0], axis=0)
    if not hessian:
        mine = (indices == mx.arange(experts)[:, None]).astype(mx.float32)
        return mine @ (repeated * repeated)
    moments = []
    for expert in range(experts):
        mine = (indices == expert).astype(mx.float32)[:, None]
        moment = (repeated * mine).T @ repeated
        mx.eval(moment)
        moments.append(moment)
    return mx.stack(moments)


def _stacked(module: nn.Module) -> int | None:
    """Number of matrices stacked in ``module``, None for an ordinary layer."""
    return int(module.weight.shape[0]) if module.weight.ndim == 3 else None


def recorded_run(
    sequence: BlockSequence, index: int, hidden: mx.array, entered: Any
) -> tuple[mx.array, dict[str, list[ModuleInput]]]:
    """Run block ``index`` and keep what its quantizable modules were called on, by path."""
    path = tuple(sequence.blocks)[index]
    inputs: dict[str, list[ModuleInput]] = {}

    def keep(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs.setdefault(f"{path}.{name}", []).append(ModuleInput.of(args))
        return call(*args, **kwargs)

    with intercepted(quantizable(sequence.blocks[path]), keep):
        output = sequence.run(index, hidden, entered)
    return output, inputs


def input_statistics(
    sequence: BlockSequence,
    batches: Sequence[mx.array],
    hold: Hold = always_held,
    wants_hessian: Callable[[str], bool] = lambda path: True,
) -> Iterator[tuple[str, InputStatistics]]:
    """Statistics of every quantizable module that is called on vectors, over ``batches`` (sequences, length) of tokens.

    Block by block, then the head, a tied embedding being one: a block's weights are held once, while all batches pass
    through it. What the consumer does to a block's weights between two items (quantizing them, say) does not change
    what later blocks are given. Modules called on the same inputs (queries, keys and values) share one object.
    """
    import mlx.core as mx

    entries = [sequence.enter(batch) for batch in batches]
    hidden = [entered.hidden for entered in entries]
    mx.eval(hidden)
    for index, (path, block) in enumerate(sequence.blocks.items()):
        with hold(path):
            calls: dict[str, list[ModuleInput]] = {}
            runs = side_by_side(partial(recorded_run, sequence, index), list(zip(hidden, entries, strict=True)))
            for k, (output, inputs) in enumerate(runs):
                hidden[k] = output
                for name, part in inputs.items():
                    calls.setdefault(name, []).extend(part)
            modules = {f"{path}.{name}": module for name, module in quantizable(block).items()}
            yield from _gathered(calls, modules, wants_hessian)
    for path, module in outside_of(sequence.model, sequence.blocks).items():
        found = head_calls(sequence, path, module, batches, hidden)
        if statistics := gather(found, module, hessian=wants_hessian(path)):
            yield path, statistics


def _gathered(
    calls: dict[str, list[ModuleInput]], modules: Mapping[str, nn.Module], wants_hessian: Callable[[str], bool]
) -> Iterator[tuple[str, InputStatistics]]:
    """Statistics of one block's modules; each module's calls are let go as it is done."""
    shared: tuple[Any, InputStatistics | None] | None = None
    for name in list(calls):
        mine = calls.pop(name)
        same_inputs = [(id(call.x), id(call.indices)) for call in mine], wants_hessian(name)
        if shared is None or shared[0] != same_inputs:
            shared = (same_inputs, gather(mine, modules[name], hessian=same_inputs[1]))
        if shared[1]:
            yield name, shared[1]


def head_calls(
    sequence: BlockSequence,
    path: str,
    module: nn.Module,
    batches: Sequence[mx.array],
    last: Sequence[mx.array],
) -> list[ModuleInput]:
    """What a module after the blocks is called on, given what the last block gave (``last``); [] where never.

    Of a tied embedding these are its calls as the head: looking rows up takes no vectors.
    """
    import mlx.core as mx

    calls: list[ModuleInput] = []

    def keep(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if mx.issubdtype(args[0].dtype, mx.floating):
            calls.append(ModuleInput.of(args))
        return call(*args, **kwargs)

    with intercepted({path: module}, keep):
        for batch, hidden in zip(batches, last, strict=True):
            sequence.leave(batch, hidden)
    return calls
