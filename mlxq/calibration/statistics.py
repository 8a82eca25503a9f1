"""What calibration text says of each module's inputs: second moments, by expert where there are experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.calibration.blocks import BlockSequence, intercepted, quantizable

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

# An expert's statistics count as if this many tokens of the average expert had been seen besides its own.
EXPERT_FLOOR_TOKENS = 64
# hold(path): a context in which the weights of the module at ``path`` are in memory.
Hold = Callable[[str], AbstractContextManager[Any]]


def always_held(path: str) -> AbstractContextManager[Any]:
    """The ``hold`` of a model that is in memory whole."""
    return nullcontext()


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a module's inputs x over ``tokens`` tokens.

    ``hessian`` (..., columns, columns) float32 is the mean of x xᵀ, with a leading axis of experts for a stack.
    """

    hessian: mx.array
    tokens: int

    @property
    def second_moment(self) -> mx.array:
        """Mean of each input squared (..., columns)."""
        import mlx.core as mx

        return mx.diagonal(self.hessian, axis1=-2, axis2=-1)


@dataclass(frozen=True)
class ModuleInput:
    """One call of a module: ``x`` and, for a stack of experts, ``indices``: the expert of each row of output."""

    x: mx.array
    indices: mx.array | None

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> ModuleInput:
        """From the arguments of ``Linear`` (x) or ``SwitchLinear`` (x, indices, ...)."""
        return cls(args[0], args[1] if len(args) > 1 else None)


def gather(inputs: Sequence[ModuleInput], experts: int | None) -> InputStatistics:
    """Statistics of a module over its calls, by expert where it stacks ``experts``."""
    import mlx.core as mx

    total = _moments(inputs[0], experts)
    for call in inputs[1:]:
        total = total + _moments(call, experts)
    if experts is None:
        tokens = sum(call.x.size // call.x.shape[-1] for call in inputs)
        return InputStatistics(total / tokens, tokens)
    counts = mx.zeros(experts)
    for call in inputs:
        if call.indices is not None:
            counts = counts + (call.indices.reshape(-1, 1) == mx.arange(experts)).astype(mx.float32).sum(axis=0)
    tokens = int(float(counts.sum()))
    typical = total.sum(axis=0) / max(tokens, 1)
    floored = total + EXPERT_FLOOR_TOKENS * typical
    return InputStatistics(floored / (counts + EXPERT_FLOOR_TOKENS)[:, None, None], tokens)


def _moments(call: ModuleInput, experts: int | None) -> mx.array:
    """Sum of x xᵀ over a call's tokens, (columns, columns) or (experts, columns, columns)."""
    import mlx.core as mx

    rows = call.x.reshape(-1, call.x.shape[-1]).astype(mx.float32)
    if experts is None or call.indices is None:
        return rows.T @ rows
    indices = call.indices.reshape(-1)
    # One token may be given once for all the experts that it goes to.
    repeated = mx.repeat(rows, indices.size // rows.shape[0], axis=0)
    moments = []
    for expert in range(experts):
        mine = (indices == expert).astype(mx.float32)[:, None]
        moment = (repeated * mine).T @ repeated
        mx.eval(moment)
        moments.append(moment)
    return mx.stack(moments)


def experts_of(module: nn.Module) -> int | None:
    """Number of experts stacked in ``module``, None for an ordinary layer."""
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
    sequence: BlockSequence, batches: Sequence[mx.array], hold: Hold = always_held
) -> Iterator[tuple[str, InputStatistics]]:
    """Statistics of every quantizable module in the blocks over ``batches`` of tokens (sequences, length).

    Block by block: a block's weights are held once, while all batches pass through it. What the consumer does to
    a block's weights between two items (quantizing them, say) does not change what later blocks are given.
    """
    import mlx.core as mx

    entries = [sequence.enter(batch) for batch in batches]
    hidden = [entered.hidden for entered in entries]
    mx.eval(hidden)
    for index, (path, block) in enumerate(sequence.blocks.items()):
        with hold(path):
            calls: dict[str, list[ModuleInput]] = {}
            for k, entered in enumerate(entries):
                hidden[k], inputs = recorded_run(sequence, index, hidden[k], entered)
                mx.eval(hidden[k], [[call.x for call in part] for part in inputs.values()])
                for name, part in inputs.items():
                    calls.setdefault(name, []).extend(part)
            modules = {f"{path}.{name}": module for name, module in quantizable(block).items()}
            for name in list(calls):
                yield name, gather(calls.pop(name), experts_of(modules[name]))
