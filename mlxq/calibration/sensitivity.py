"""How much each module's KL divergence grows in each format: the scores that an allocation adds up.

For weights W replaced by W + D the divergence of the model's next-token distributions is, to second order,
half the mean over tokens of (g . D x)^2: x the module's input, g the gradient of the log-likelihood at its
output, labels drawn from the model itself (the Fisher information as the KL's Hessian; Kunstner et al.,
arXiv:1905.12558, on why drawn and not observed labels). Modules outside the blocks (embeddings, heads) reach far
beyond that order at few bits and have their divergence measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlxq.calibration.blocks import BlockSequence, Entered, intercepted, outside_of, quantizable, side_by_side
from mlxq.calibration.statistics import (
    Hold,
    InputStatistics,
    ModuleInput,
    always_held,
    gather,
    head_calls,
)
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

# Tokens that a divergence outside the blocks is measured on: an embedding costs a forward pass for each option.
MEASURED_TOKENS = 1024
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
    all. Between the two come modules outside the blocks; one ahead of them costs a forward pass an option.
    """
    import mlx.core as mx

    entries = [sequence.enter(batch) for batch in batches]
    inputs = [[entered.hidden for entered in entries]]
    mx.eval(inputs)
    for index, path in enumerate(sequence.blocks):
        with hold(path):
            inputs.append(sequence.run_all(index, inputs[-1], entries))
    outside = {p: formats for p, formats in options.items() if p in outside_of(sequence.model, sequence.blocks)}
    yield from _measured_scores(sequence, batches, inputs[-1], outside, encode, hold)

    tokens = sum(batch.size for batch in batches)
    key = mx.random.key(seed)
    gradients = [_head_gradient(sequence, batch, h, key) for batch, h in zip(batches, inputs.pop(), strict=True)]
    for index in reversed(range(len(sequence.blocks))):
        path = tuple(sequence.blocks)[index]
        with hold(path):
            calls: dict[str, list[_Call]] = {}
            back = [(sequence, index, *each) for each in zip(inputs.pop(), entries, gradients, strict=True)]
            for k, (below, part) in enumerate(side_by_side(_backward, back)):
                gradients[k] = below
                for name, found in part.items():
                    calls.setdefault(f"{path}.{name}", []).extend(found)
            for name, module in quantizable(sequence.blocks[path]).items():
                full = f"{path}.{name}"
                if full in options and full in calls:
                    yield from _module_scores(full, module, calls.pop(full), options[full], encode, tokens)


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
) -> tuple[mx.array, dict[str, list[_Call]]]:
    """Run block ``index`` again and take the gradient back through it.

    Returns the gradient at ``hidden`` and, for each call of each quantizable module, its arguments and output
    gradient. These come from a zero added to each output, whose gradient is the output's.
    """
    import mlx.core as mx

    modules = quantizable(sequence.blocks[tuple(sequence.blocks)[index]])
    kwargs_of: dict[str, list[dict[str, Any]]] = {}
    zeros: dict[str, list[mx.array]] = {}

    def measure(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        zeros.setdefault(name, []).append(mx.zeros(output.shape, output.dtype))
        kwargs_of.setdefault(name, []).append(kwargs)
        return output

    with intercepted(modules, measure):
        sequence.run(index, hidden, entered)

    def weighted_output(h: mx.array, probes: dict[str, list[mx.array]]) -> tuple[mx.array, dict[str, Any]]:
        recorded: dict[str, list[Any]] = {}

        def probe(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nth = len(recorded.setdefault(name, []))
            recorded[name].append(args)
            return call(*args, **kwargs) + probes[name][nth]

        with intercepted(modules, probe):
            output = sequence.run(index, h, entered)
        return (output * gradient).sum(), recorded

    (_, args_of), (below, at) = mx.value_and_grad(weighted_output, argnums=(0, 1))(hidden, zeros)
    calls = {
        name: [_Call(tuple(args), *rest) for args, *rest in zip(args_of[name], kwargs_of[name], at[name], strict=True)]
        for name in args_of
    }
    return below, calls


def _module_scores(
    path: str, module: nn.Module, calls: Sequence[_Call], formats: Sequence[Format], encode: Encoder, tokens: int
) -> Iterator[Score]:
    """Half the mean over ``tokens``, those of the text: a call for each of several experts is part of one token."""
    import mlx.core as mx

    statistics = gather([ModuleInput.of(call.args) for call in calls], module, hessian=False)
    original = module.weight
    bias = module.bias if "bias" in module else None
    try:
        if bias is not None:
            module.bias = mx.zeros_like(bias)
        for fmt in formats:
            change = encode(path, original, fmt, statistics) - original.astype(mx.float32)
            # The module itself, with the change for weights, says what the change does to its output.
            module.weight = change.astype(original.dtype)
            mx.eval(module.weight)

            def effect_of(call: _Call) -> mx.array:
                effect = (module(*call.args, **call.kwargs) * call.gradient).astype(mx.float32).sum(axis=-1)
                squared: mx.array = (effect * effect).sum()
                return squared

            total = sum(float(part) for part in side_by_side(effect_of, [(call,) for call in calls]))
            yield Score(path, fmt, 0.5 * total / tokens)
    finally:
        module.weight = original
        if bias is not None:
            module.bias = bias


@dataclass(frozen=True)
class _Probe:
    """A sequence that divergence is measured on: ``tokens`` (1, length), and which row of which batch it is."""

    tokens: mx.array
    batch: int
    row: int


def _probes(batches: Sequence[mx.array]) -> list[_Probe]:
    """Sequences of up to ``MEASURED_TOKENS``, taken evenly from all the text."""
    every = [_Probe(batch[row : row + 1], k, row) for k, batch in enumerate(batches) for row in range(len(batch))]
    count = max(1, min(len(every), MEASURED_TOKENS // every[0].tokens.size))
    return [every[i * len(every) // count] for i in range(count)]


@dataclass(frozen=True)
class _Variant:
    """A module outside the blocks in one format: the hidden states (1, length, width) it leads to, by probe.

    Its weight is made when it is needed: of a large vocabulary, all formats together would not fit.
    """

    path: str
    module: nn.Module
    fmt: Format
    changed: Callable[[], mx.array]
    hidden: list[mx.array]


def _measured_scores(
    sequence: BlockSequence,
    batches: Sequence[mx.array],
    last: Sequence[mx.array],
    options: Mapping[str, Sequence[Format]],
    encode: Encoder,
    hold: Hold,
) -> Iterator[Score]:
    """The divergence itself of each module of ``options``, all outside the blocks, in each of its formats.

    ``last`` is what the last block gave for each batch. What the module is called on at the head guides its
    encoding, a tied embedding's too.
    """
    probes = _probes(batches)
    references = [last[probe.batch][probe.row : probe.row + 1] for probe in probes]
    ahead = sequence.enter(probes[0].tokens).before
    variants = []
    for path, module in outside_of(sequence.model, sequence.blocks).items():
        if path not in options:
            continue
        calls = head_calls(sequence, path, module, batches, last)
        statistics = gather(calls, module, hessian=False)
        for fmt in options[path]:
            changed = partial(encode, path, module.weight, fmt, statistics)
            # What comes after the blocks changes logits alone: the original's hidden states are the variant's too.
            variant = _Variant(path, module, fmt, changed, list(references))
            if path in ahead:
                variants.append(variant)
            else:
                yield _measured(sequence, variant, probes, references)
    if variants:
        _run_variants(sequence, probes, variants, hold)
    for variant in variants:
        yield _measured(sequence, variant, probes, references)


def _run_variants(sequence: BlockSequence, probes: Sequence[_Probe], variants: Sequence[_Variant], hold: Hold) -> None:
    """Take variants of modules ahead of the blocks through them, all while a block is held."""
    import mlx.core as mx

    entries: list[list[Entered]] = []
    for variant in variants:
        with changed_weight(variant.module, variant.changed()):
            entries.append([sequence.enter(probe.tokens) for probe in probes])
            variant.hidden[:] = [entered.hidden for entered in entries[-1]]
            mx.eval(variant.hidden)
    for index, path in enumerate(sequence.blocks):
        with hold(path):
            for variant, entered in zip(variants, entries, strict=True):
                variant.hidden[:] = sequence.run_all(index, variant.hidden, entered)


@contextmanager
def changed_weight(module: nn.Module, weight: mx.array) -> Iterator[None]:
    """Within the context ``module`` has ``weight``, in its own dtype."""
    import mlx.core as mx

    original = module.weight
    module.weight = weight.astype(original.dtype)
    mx.eval(module.weight)
    try:
        yield
    finally:
        module.weight = original


def _measured(
    sequence: BlockSequence, variant: _Variant, probes: Sequence[_Probe], references: Sequence[mx.array]
) -> Score:
    """The divergence of a variant's logits, with its module changed at the head too where it is tied."""
    changed = variant.changed()

    def divergence_of(probe: _Probe, reference: mx.array, hidden: mx.array) -> mx.array:
        p = sequence.leave(probe.tokens, reference)
        with changed_weight(variant.module, changed):
            q = sequence.leave(probe.tokens, hidden)
        return divergence(p, q).sum()

    arguments = list(zip(probes, references, variant.hidden, strict=True))
    total = sum(float(part) for part in side_by_side(divergence_of, arguments))
    # Rounding alone can take a divergence of next to nothing below zero.
    return Score(variant.path, variant.fmt, max(0.0, total / sum(probe.tokens.size for probe in probes)))


def divergence(reference: mx.array, candidate: mx.array) -> mx.array:
    """KL(reference || candidate) in nats for each token, from logits (..., vocabulary)."""
    import mlx.core as mx

    p, q = reference.astype(mx.float32), candidate.astype(mx.float32)
    crossed = (mx.softmax(p, axis=-1) * (p - q)).sum(axis=-1)
    return crossed - mx.logsumexp(p, axis=-1) + mx.logsumexp(q, axis=-1)
