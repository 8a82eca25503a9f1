"""Fuzzing: seeds are mutated, and what reaches new code is kept as a seed for the rest of the run.

    python -m tests.reliability.fuzz [TARGET ...] [--executions N] [--seed N]

Lines reached are counted in every ``GUIDED_EVERY``-th execution: tracing makes one some ten times slower. Ends with one
summary line per target, and exit code 1 where any execution ended in a traceback, took over two seconds, or memory grew
by over 200 MB.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from tests.reliability.fuzz_targets import EXPLAINED, TARGETS

CORPUS = Path(__file__).with_name("corpus")
HANG_S = 2.0
GROWTH_BYTES = 200 << 20
GUIDED_EVERY = 8
MOST_SEEDS = 2000
LONGEST = 1 << 14
_PACKAGE = f"{os.sep}mlxq{os.sep}"
# What parsers stumble over: ends of ranges, brackets that do not close, numbers and words of the wrong kind.
_WORDS: tuple[bytes, ...] = (
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"4294967296", b"9223372036854775808", b'""'),
    *(b"[]", b"{}", b"[[[[[[[[", b'{"a":', b'"\\ud800"', b"\\u202e", b"\xe2\x80\xae", b"\x1b[31m", b"\x00", b"\xff"),
    *(b"*a", b"&a [*a]", b"!!int ''", b"<<: ", b"2024-99-99", b"---\n", b"...\n", b"\t", b": ", b"- ", b"0x", b"1_0"),
    *(b"\xff" * 8, b"\x00" * 8, b"\x01\x00\x00\x00\x00\x00\x00\x00", b"\x08\x00\x00\x00", b"\x09\x00\x00\x00"),
    *(b"9" * 400, b"[" * 300, b"(a+)+$", b"..", b"/", b"~", b"$x$", b"<script>", b"|", b"`", b"```", b"%"),
)


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 64, 10**9, 10**12, 1 << 63, -(1 << 63), 10**400, 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "affine", "BF16", "../x", "\ud800", "\x1b[31m\u202e", "9" * 5000),
    *([], {}, [[]], [{}], {"": {}}, [0, 0], [1, None], ["a"], [1] * 300, {"a": [1]}, {"bits": 4}),
)


@dataclass
class Outcome:
    """What a campaign on one target came to. ``failures`` holds the first of each kind: its input and traceback."""

    target: str
    executions: int = 0
    refused: int = 0
    hangs: int = 0
    growth_bytes: int = 0
    seeds: int = 0
    lines: int = 0
    failures: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether every execution ended as promised."""
        return not self.failures and not self.hangs and self.growth_bytes <= GROWTH_BYTES

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.executions:,} executions, {self.refused:,} refused in one line, "
            f"{len(self.failures)} kinds of traceback, {self.hangs} over {HANG_S:g} s, "
            f"{self.growth_bytes / 1e6:.0f} MB growth, {self.lines} lines reached, {self.seeds} seeds"
        )


class Lines:
    """The lines of mlxq that executions reached so far."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def reached_more(self, call: Callable[[], None]) -> bool:
        """Run ``call`` traced; whether it reached a line that none before it did."""
        before = len(self.seen)
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(None)
        return len(self.seen) > before

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if _PACKAGE in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def mutated(seeds: list[bytes], rng: random.Random) -> bytes:
    """A seed with a few small changes: bytes flipped, cut, doubled, replaced by a word, or joined to another seed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 32)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 16))
        elif kind == 4:
            data[at:end] = rng.choice(_WORDS)
        elif kind == 5:
            data[at:at] = rng.choice(_WORDS)
        else:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            data[at:end] = other[start : start + rng.choice((4, 16, 64))]
    return bytes(data[:LONGEST])


def reshaped(seeds: list[bytes], rng: random.Random) -> bytes | None:
    """A seed that is JSON with one value in it replaced, taken out or doubled; None where the seed drawn is none.

    Bytes changed at random are seldom JSON any more, and then say nothing of what reads its values.
    """
    seed = rng.choice(seeds)
    length = 8 if seed[8:9] == b"{" and seed[:1] != b"{" else 0
    try:
        data = json.loads(seed[length:])
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(data))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "mode", "__metadata__", "dtype", "\u202e"))] = copy.deepcopy(holder[key])
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    text = json.dumps(data).encode()
    return (struct.pack("<Q", len(text)) if length else b"") + text[:LONGEST]


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys: Iterable[Any] = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in list(keys):
        yield data, key
        yield from _places(data[key])


def _hung(signum: int, frame: object) -> None:
    raise TimeoutError(f"it took over {5 * HANG_S:g} s")


def fuzz(name: str, executions: int, seed: int) -> Outcome:
    """``executions`` of a target from the seeds of its corpus."""
    signal.signal(signal.SIGALRM, _hung)
    target, rng, lines = TARGETS[name], random.Random(f"{name} {seed}"), Lines()
    seeds = [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]
    outcome = Outcome(name)
    process = psutil.Process()
    started_bytes = 0
    for number in range(executions):
        data = seeds[number] if number < len(seeds) else _next(seeds, rng)
        began = time.perf_counter()
        # Every seed of the corpus is traced, so that what is kept later reaches more than they do.
        if number < len(seeds) or number % GUIDED_EVERY == 0:
            if lines.reached_more(lambda data=data: _run(target, data, outcome)) and len(seeds) < MOST_SEEDS:  # type: ignore[misc]
                seeds.append(data)
        else:
            _run(target, data, outcome)
        outcome.hangs += time.perf_counter() - began > HANG_S
        if number == min(1000, executions // 2):
            gc.collect()
            started_bytes = process.memory_info().rss
        if number % 5000 == 4999 or number == executions - 1:
            outcome.growth_bytes = max(outcome.growth_bytes, process.memory_info().rss - started_bytes)
    outcome.seeds, outcome.lines = len(seeds), len(lines.seen)
    return outcome


def _next(seeds: list[bytes], rng: random.Random) -> bytes:
    made = reshaped(seeds, rng) if rng.random() < 0.5 else None
    return mutated(seeds, rng) if made is None else made


def _run(target: Callable[[bytes], None], data: bytes, outcome: Outcome) -> None:
    outcome.executions += 1
    signal.setitimer(signal.ITIMER_REAL, 5 * HANG_S)
    try:
        target(data)
    except EXPLAINED:
        outcome.refused += 1
    except Exception as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        kind = f"{type(exc).__name__} at {Path(where.filename).name}:{where.lineno}"
        outcome.failures.setdefault(kind, (data, traceback.format_exc()))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    """Run the campaigns that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--executions", type=int, default=130_000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    outcomes = []
    for name in asked.targets:
        outcomes.append(fuzz(name, asked.executions, asked.seed))
        print(outcomes[-1], flush=True)
        for kind, (data, trace) in outcomes[-1].failures.items():
            print(f"--- {kind}: {data[:400]!r}\n{trace}", flush=True)
    total = sum(outcome.executions for outcome in outcomes)
    tracebacks = sum(len(outcome.failures) for outcome in outcomes)
    hangs = sum(outcome.hangs for outcome in outcomes)
    growth = max(outcome.growth_bytes for outcome in outcomes)
    print(f"total: {total:,} executions, {tracebacks} tracebacks, {hangs} hangs, {growth / 1e6:.0f} MB growth at most")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
