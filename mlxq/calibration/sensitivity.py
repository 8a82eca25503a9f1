"""How much each module's KL divergence grows in each format: the scores that an allocation adds up.

For weights W replaced by W + D the divergence of the model's next-token distributions is, to second order,
half the mean over tokens of (g . D x)^2: x the module's input, g the gradient of the log-likelihood at its
output, labels drawn from the model itself (the Fisher information as the KL's Hessian; Kunstner et al.,
arXiv:1905.12558, on why drawn and not observed labels). Modules outside the blocks (embeddings, heads) reach far
beyond that order at few bits and have their divergence measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.calibration.blocks import BlockSequence, Entered, intercepted, outside_of, quantizable
from mlxq.calibration.statistics import Hold, InputStatistics, ModuleInput, always_held, experts_of, gather
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

# Tokens that a divergence outside the blocks is measured on: an embedding costs a forward pass for each option.
MEASURED_TOKENS = 4096
# encode(path, weight, format, statistics) -> the decoded float32 weights that would be stored. None: not scored.
Encoder = Callable[[str, "mx.array", Format, "InputStatistics | None"], "mx.array"]


@dataclass(frozen=True)
class Score:
    """Expected KL divergence, in nats per token, of one module alone in ``fmt``."""

    path: str
    fmt: Format
    divergence: float


def scores(
    sequence: BlockSequence,
    batches: Sequence[mx.array],
    options: Mapping[str, Sequence[Format]],
    encode: Encoder,
    hold: Hold = always_held,
    seed: int = 0,
) -> Iterator[Score]:
    """Score each module of ``options`` (path -> formats) over ``batches`` of tokens (sequences, length).

    One pass forward through the blocks, whose inputs are kept, and one back from the last block to the first, in
    which each block is run again from its input: memory holds one block's weights and gradients and the inputs of
    all. Modules outside the blocks come first and cost up to one forward pass an option.
    """
    import mlx.core as mx

    entries = [sequence.enter(batch) for batch in batches]
    inputs = [[entered.hidden for entered in entries]]
    mx.eval(inputs)
    for index, path in enumerate(sequence.blocks):
        with hold(path):
            inputs.append([_evaluated(sequence.run(index, h, e)) for h, e in zip(inputs[-1], entries, strict=True)])
    yield from _outside_scores(sequence, batches, entries, inputs[-1], options, encode)

    key = mx.random.key(seed)
    gradients = [_head_gradient(sequence, batch, h, key) for batch, h in zip(batches, inputs.pop(), strict=True)]
    for index in reversed(range(len(sequence.blocks))):
        path = tuple(sequence.blocks)[index]
        with hold(path):
            calls: dict[str, list[_Call]] = {}
            for k, (hidden, entered) in enumerate(zip(inputs.pop(), entries, strict=True)):
                gradients[k], part = _backward(sequence, index, hidden, entered, gradients[k])
                for name, call in part.items():
                    calls.setdefault(f"{path}.{name}", []).append(call)
            for name, module in quantizable(sequence.blocks[path]).items():
                full = f"{path}.{name}"
                if full in options and full in calls:
                    yield from _module_scores(full, module, calls.pop(full), options[full], encode)


@dataclass(frozen=True)
class _Call:
    """One call of a module: arguments and the gradient at its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    gradient: mx.array


def _evaluated(array: mx.array) -> mx.array:
    import mlx.core as mx

    mx.eval(array)
    return array


def _head_gradient(sequence: BlockSequence, tokens: mx.array, hidden: mx.array, key: mx.array) -> mx.array:
    """Gradient at ``hidden`` of the summed log-likelihood of labels drawn from the model, a sequence at a time."""
    import mlx.core as mx

    def likelihood(h: mx.array, row: mx.array, row_key: mx.array) -> mx.array:
        logits = sequence.leave(row, h).astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        labels = mx.random.categorical(mx.stop_gradient(logits), key=row_key)
        return mx.take_along_axis(logits, labels[..., None], axis=-1).sum()

    gradient = mx.grad(likelihood)
    rows = []
    for index in range(tokens.shape[0]):
        # The text itself makes the key, so batches of any size draw the same labels.
        row_key = mx.random.split(key, 2)[1] + tokens[index].sum().astype(mx.uint32)
        rows.append(_evaluated(gradient(hidden[index : index + 1], tokens[index : index + 1], row_key)))
    return mx.concatenate(rows)


def _backward(
    sequence: BlockSequence, index: int, hidden: mx.array, entered: Entered, gradient: mx.array
) -> tuple[mx.array, dict[str, _Call]]:
    """Run block ``index`` again and take the gradient back through it.

    Returns the gradient at ``hidden`` and, for each quantizable module, its arguments and output gradient. These
    come from a zero added to each output, whose gradient is the output's.
    """
    import mlx.core as mx

    modules = quantizable(sequence.blocks[tuple(sequence.blocks)[index]])
    kwargs_of: dict[str, dict[str, Any]] = {}
    shapes: dict[str, mx.array] = {}

    def measure(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        shapes[name] = mx.zeros(output.shape, output.dtype)
        return output

    with intercepted(modules, measure):
        sequence.run(index, hidden, entered)

    def weighted_output(h: mx.array, probes: dict[str, mx.array]) -> tuple[mx.array, dict[str, Any]]:
        recorded: dict[str, Any] = {}

        def probe(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            recorded[name] = args
            kwargs_of[name] = kwargs
            return call(*args, **kwargs) + probes[name]

        with intercepted(modules, probe):
            output = sequence.run(index, h, entered)
        return (output * gradient).sum(), recorded

    (_, args_of), (below, at) = mx.value_and_grad(weighted_output, argnums=(0, 1))(hidden, shapes)
    mx.eval(below, at, args_of)
    return below, {name: _Call(tuple(args_of[name]), kwargs_of[name], at[name]) for name in args_of}


def _module_scores(
    path: str, module: nn.Module, calls: Sequence[_Call], formats: Sequence[Format], encode: Encoder
) -> Iterator[Score]:
    import mlx.core as mx

    statistics = gather([ModuleInput.of(call.args) for call in calls], experts_of(module))
    tokens = statistics.tokens if experts_of(module) is None else _tokens(calls)
    original = module.weight
    bias = module.bias if "bias" in module else None
    try:
        if bias is not None:
            module.bias = mx.zeros_like(bias)
        for fmt in formats:
            change = encode(path, original, fmt, statistics) - original.astype(mx.float32)
            # The module itself, with the change for weights, says what the change does to its output.
            module.weight = change.astype(original.dtype)
            total = mx.zeros(())
            for call in calls:
                effect = (module(*call.args, **call.kwargs) * call.gradient).astype(mx.float32).sum(axis=-1)
                total = _evaluated(total + (effect * effect).sum())
            yield Score(path, fmt, 0.5 * float(total) / max(tokens, 1))
    finally:
        module.weight = original
        if bias is not None:
            module.bias = bias


def _tokens(calls: Sequence[_Call]) -> int:
    """Tokens that went to a stack of experts; each goes to as many as its router chose."""
    return sum(call.args[0].size // call.args[0].shape[-1] for call in calls)


def _outside_scores(
    sequence: BlockSequence,
    batches: Sequence[mx.array],
    entries: Sequence[Entered],
    last: Sequence[mx.array],
    options: Mapping[str, Sequence[Format]],
    encode: Encoder,
) -> Iterator[Score]:
    """Measured divergence of each module outside the blocks in each format."""
    for path, module in outside_of(sequence.model, sequence.blocks).items():
        original = module.weight
        early = any(path in entered.before for entered in entries)
        # A head's inputs are known; an embedding's columns all carry about the same.
        statistics = None if early else _head_statistics(sequence, path, module, batches, last)
        for fmt in options.get(path, ()):
            changed = encode(path, original, fmt, statistics).astype(original.dtype)
            total, tokens = 0.0, 0
            for row, hidden in _rows(batches, last):
                reference = _evaluated(sequence.leave(row, hidden))
                module.weight = changed
                try:
                    ours = sequence.model(row) if early else sequence.leave(row, hidden)
                    total += float(divergence(reference, getattr(ours, "logits", ours)).sum())
                finally:
                    module.weight = original
                tokens += row.size
                if tokens >= MEASURED_TOKENS:
                    break
            yield Score(path, fmt, total / max(tokens, 1))


def _rows(batches: Sequence[mx.array], last: Sequence[mx.array]) -> Iterator[tuple[mx.array, mx.array]]:
    """Sequences one at a time, (1, length), with their hidden states, (1, length, width)."""
    for batch, hidden in zip(batches, last, strict=True):
        for row in range(batch.shape[0]):
            yield batch[row : row + 1], hidden[row : row + 1]


def _head_statistics(
    sequence: BlockSequence,
    path: str,
    module: nn.Module,
    batches: Sequence[mx.array],
    last: Sequence[mx.array],
) -> InputStatistics | None:
    """Statistics of the inputs of a module called after the last block; None where the text never calls it."""
    import mlx.core as mx

    calls: list[ModuleInput] = []

    def keep(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls.append(ModuleInput.of(args))
        return call(*args, **kwargs)

    with intercepted({path: module}, keep):
        for batch, hidden in zip(batches, last, strict=True):
            sequence.leave(batch, hidden)
    if not calls:
        return None
    statistics = gather(calls, experts_of(module))
    mx.eval(statistics.hessian)
    return statistics


def divergence(reference: mx.array, candidate: mx.array) -> mx.array:
    """KL(reference || candidate) in nats for each token, from logits (..., vocabulary)."""
    import mlx.core as mx

    p = reference.astype(mx.float32)
    q = candidate.astype(mx.float32)
    p = p - mx.logsumexp(p, axis=-1, keepdims=True)
    q = q - mx.logsumexp(q, axis=-1, keepdims=True)
    return (mx.exp(p) * (p - q)).sum(axis=-1)
