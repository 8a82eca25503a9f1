"""The measured divergence of whole assignments of formats, all in one pass through the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mlxq.calibration.blocks import Entered, outside_of, quantizable
from mlxq.calibration.sensitivity import changed_weight, divergence
from mlxq.calibration.streamed import StreamedModel
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

# decoded(path, weight, format) -> the float32 weights that would be stored.
Decoded = Callable[[str, "mx.array", Format], "mx.array"]
Assignment = Mapping[str, Format | None]


def measured_divergences(
    streamed: StreamedModel, batches: Sequence[mx.array], assignments: Sequence[Assignment], decoded: Decoded
) -> Iterator[int | list[list[float]]]:
    """Mean KL divergence in nats of each sequence of ``batches`` (sequences, length) for each assignment.

    Yields the count of finished blocks, and at last a list by assignment of lists by sequence. The reference and
    all assignments pass through a block while it is held; a weight that several share is encoded once.
    """
    sequence = streamed.sequence
    reference = [sequence.enter(batch) for batch in batches]
    hidden = [entered.hidden for entered in reference]
    outside = outside_of(sequence.model, sequence.blocks)
    entries: list[list[Entered]] = []
    for assignment in assignments:
        with _assigned(outside, "", assignment, decoded, {}):
            entries.append([sequence.enter(batch) for batch in batches])
            _evaluate(entries[-1])
    theirs = [[entered.hidden for entered in part] for part in entries]
    for index, path in enumerate(sequence.blocks):
        with streamed.hold(path):
            hidden = sequence.run_all(index, hidden, reference)
            modules = quantizable(sequence.blocks[path])
            shared: dict[tuple[str, Format], mx.array] = {}
            for k, assignment in enumerate(assignments):
                with _assigned(modules, f"{path}.", assignment, decoded, shared):
                    theirs[k] = sequence.run_all(index, theirs[k], entries[k])
        yield index + 1
    found = []
    for k, assignment in enumerate(assignments):
        # The head's weight differs between the two, so the reference's logits come first, sequence by sequence.
        per_sequence: list[float] = []
        decoded_once: dict[tuple[str, Format], mx.array] = {}
        for batch, ours, mine in zip(batches, hidden, theirs[k], strict=True):
            for row in range(batch.shape[0]):
                at = slice(row, row + 1)
                p = sequence.leave(batch[at], ours[at])
                with _assigned(outside, "", assignment, decoded, decoded_once):
                    q = sequence.leave(batch[at], mine[at])
                per_sequence.append(float(divergence(p, q).mean()))
        found.append(per_sequence)
    yield found


def _evaluate(entries: Sequence[Entered]) -> None:
    import mlx.core as mx

    mx.eval([entered.hidden for entered in entries])


@contextmanager
def _assigned(
    modules: Mapping[str, nn.Module],
    prefix: str,
    assignment: Assignment,
    decoded: Decoded,
    shared: dict[tuple[str, Format], mx.array],
) -> Iterator[None]:
    """Within the context each of ``modules`` has the weight that its assigned format would store."""
    with ExitStack() as stack:
        for name, module in modules.items():
            path = f"{prefix}{name}"
            fmt = assignment.get(path)
            if fmt is None:
                continue
            if (path, fmt) not in shared:
                shared[path, fmt] = decoded(path, module.weight, fmt)
            stack.enter_context(changed_weight(module, shared[path, fmt]))
        yield
