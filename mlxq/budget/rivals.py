"""What an allocation is held against on held-out text, and when one of these takes its place."""

from __future__ import annotations

import statistics as stats
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlxq.budget.allocate import Option, allocate
from mlxq.calibration.measured import Assignment

# A change of mind must win by this many standard errors of the paired difference (two-sided 95%, 7 degrees of freedom).
PAIRED_ERRORS = 2.36
# What exceeds the budget by no more of it is measured beside the others, though never chosen.
SAME_SIZE = 0.005
# Variations on the scores: a power that flattens them, and what modules outside the blocks count.
FLATTER = 0.8
OUTSIDE_WEIGHT = 2


@dataclass(frozen=True)
class Rival:
    """An assignment to be measured, and its bytes in the modules that the budget decides."""

    name: str
    formats: Assignment
    nbytes: int


def rivals(
    options: Mapping[str, tuple[Option, ...]], most_bytes: int, presets: Mapping[str, Assignment]
) -> list[Rival]:
    """The allocation by score first, then variations on it, then the largest simpler assignments of this size.

    ``presets`` are simpler assignments by name, of which those count that give every module one of its options.
    No assignment comes twice.
    """
    by_score = [
        _rival(name, options, allocate(choices, most_bytes).formats)
        for name, choices in _variations(options)
        if sum(min(o.nbytes for o in c) for c in choices.values()) <= most_bytes
    ]
    simple = sorted(_simpler(options, presets), key=lambda each: each.nbytes)
    fitting = [each for each in simple if each.nbytes <= most_bytes]
    # Asked for 4.5 bits, a person compares with uniform 4-bit, which takes a little more.
    over = [each for each in simple if most_bytes < each.nbytes <= most_bytes * (1 + SAME_SIZE)]
    kept: list[Rival] = []
    for each in [*by_score, *fitting[-2:], *over[:1]]:
        if all(each.formats != other.formats for other in kept):
            kept.append(each)
    return kept


def _rival(name: str, options: Mapping[str, tuple[Option, ...]], formats: Assignment) -> Rival:
    nbytes = sum(next(o.nbytes for o in choices if o.fmt == formats[path]) for path, choices in options.items())
    return Rival(name, formats, nbytes)


def _variations(
    options: Mapping[str, tuple[Option, ...]],
) -> Iterator[tuple[str, Mapping[str, tuple[Option, ...]]]]:
    """The scored options as they are, then what scores may have wrong."""
    yield "by score", options
    yield (
        "no group of few bits",
        {
            path: tuple(o for o in choices if o.fmt is None or o.fmt.bits > 2) or choices
            for path, choices in options.items()
        },
    )
    yield (
        f"scores to the power {FLATTER}",
        {
            path: tuple(Option(o.fmt, o.nbytes, o.divergence**FLATTER) for o in choices)
            for path, choices in options.items()
        },
    )
    yield (
        "outside the blocks counted double",
        {
            path: choices
            if _in_a_block(path)
            else tuple(Option(o.fmt, o.nbytes, o.divergence * OUTSIDE_WEIGHT) for o in choices)
            for path, choices in options.items()
        },
    )


def _in_a_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _simpler(options: Mapping[str, tuple[Option, ...]], presets: Mapping[str, Assignment]) -> Iterator[Rival]:
    """One format for every module that may take it, the others unquantized; and the presets that can be taken."""
    allowed = {path: {option.fmt for option in choices} for path, choices in options.items()}
    for fmt in dict.fromkeys(o.fmt for choices in options.values() for o in choices if o.fmt):
        uniform = {path: fmt if fmt in formats else None for path, formats in allowed.items()}
        yield _rival(f"uniform {fmt}", options, uniform)
    for name, preset in presets.items():
        if all(preset.get(path) in formats for path, formats in allowed.items()):
            yield _rival(name, options, {path: preset.get(path) for path in options})


def winner(measured: Sequence[Sequence[float]], fits: Sequence[bool]) -> int:
    """The first, unless another that fits is better beyond the paired confidence interval; then the best of those.

    ``measured`` has KL by sequence for each assignment, of the same sequences; ``fits`` says which are in the budget.
    """
    best, least = 0, stats.fmean(measured[0])
    for index, sequences in enumerate(measured[1:], start=1):
        differences = [ours - first for ours, first in zip(sequences, measured[0], strict=True)]
        mean, error = mean_and_error(differences)
        if fits[index] and mean + PAIRED_ERRORS * error < 0 and stats.fmean(sequences) < least:
            best, least = index, stats.fmean(sequences)
    return best


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over sequences."""
    error = stats.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return stats.fmean(values), error
