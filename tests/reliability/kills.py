"""kill -9 at random moments: nothing half under the final name, and the same command ends in the same bytes.

    python -m tests.reliability.kills [--kills 200] [--seed 0]

A quarter each of the kills hits ``quantize``, ``convert``, a budget, and an upload to a Hub on loopback.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.reliability.processes import build_model, command, prepared
from tests.reliability.watching import faults_of, weights

QUANTIZE = ["quantize", "4bit", "--model", "../model", "-o", "out", "--no-generate"]
CONVERT = ["convert", "../model", "-o", "out", "--dtype", "float32"]
BUDGET = ["quantize", "../few.yaml", "--model", "../model", "-o", "out", "--no-generate"]
UPLOAD = ["upload", "out", "org/tiny"]
COMMANDS = {"quantize": QUANTIZE, "convert": CONVERT, "budget": BUDGET, "upload": UPLOAD}


def campaign(kills: int, seed: int, names: Sequence[str] = tuple(COMMANDS)) -> tuple[int, list[str]]:
    """Kill ``kills`` commands, each of ``names`` as often (an upload comes after ``quantize``).

    Returns how many of them were hit before their end, and what went wrong.
    """
    rng, wrong, hit = random.Random(seed), [], 0
    with prepared() as (work, hub):
        build_model(work / "model", layers=4)
        (work / "few.yaml").write_text("budget: {bpw: 5}\ncalibration: {tokens: 1024}\n")

        def sent(place: Path) -> list[str]:
            there = hub.files("org/tiny")
            recorded = weights(place / "out")
            differing = [name for name in recorded if there.get(name) != (place / "out" / name).read_bytes()]
            return [*faults_of(place / "out"), *(f"the Hub holds another {name}" for name in differing)]

        def made(place: Path) -> list[str]:
            same = weights(place / "out") == expected
            left = sorted(path.name for path in place.glob("out*"))
            return faults_of(place / "out") if same and left == ["out"] else [f"ends in something else, {left}"]

        for name in names:
            arguments = COMMANDS[name]
            whole = work / f"{name}-whole"
            whole.mkdir()
            if arguments is UPLOAD:
                shutil.copytree(work / "quantize-whole" / "out", whole / "out")
            seconds = _whole_run(arguments, whole)
            expected = weights(whole / "out")
            for number in range(kills // len(names)):
                place = work / f"{name}-{number}"
                place.mkdir()
                if arguments is UPLOAD:
                    shutil.copytree(work / "quantize-whole" / "out", place / "out")
                    hub.reset()
                # What was found out of the machine is kept between commands; what a budget measured is not.
                shutil.copytree(work / "cache", place / "cache", ignore=shutil.ignore_patterns("scores"))
                killed = command(arguments, place, kill_after_s=rng.uniform(0, seconds), MLXQ_CACHE="cache")
                hit += killed.code == -9
                checked: Callable[[Path], list[str]] = sent if arguments is UPLOAD else made
                found = _half(place / "out", expected) or _again(arguments, place) or checked(place)
                wrong += [f"{name} {number}: {each}" for each in found]
                shutil.rmtree(place)
    return hit, wrong


def _whole_run(arguments: list[str], place: Path) -> float:
    """Run a command that is not killed; returns its seconds."""
    ended = command(arguments, place, MLXQ_CACHE="../cache")
    if ended.code != 0:
        raise SystemExit(f"{arguments} fails without any kill: {ended.said}")
    return ended.seconds


def _half(out: Path, expected: dict[str, str]) -> list[str]:
    """What a kill left under the final name that should not be there."""
    return ["something half has the final name"] if out.exists() and weights(out) != expected else []


def _again(arguments: list[str], place: Path) -> list[str]:
    """The same command again, where it did not come to its end."""
    if arguments is not UPLOAD and (place / "out").exists():
        # It was hit while it cleaned up: with --force, which replaces what is there, everything is done once more.
        arguments = [*arguments, "--force"]
    ended = command(arguments, place, MLXQ_CACHE="cache")
    return [] if ended.code == 0 else [f"the same command fails: {ended.said}"]


def main() -> int:
    """Run the campaign and print its summary line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    hit, wrong = campaign(asked.kills, asked.seed)
    for each in wrong:
        print(each)
    print(f"kills, seed {asked.seed}: {asked.kills} commands, {hit} killed before their end, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
