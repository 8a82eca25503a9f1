"""Two and three runs at once with one output: at least one makes the model, each other says why not in one line.

    python -m tests.reliability.at_once [--rounds 40] [--seed 0]

They start together, or one after the other by up to the time a run takes; half of the rounds are with --force.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time

from tests.reliability.kills import QUANTIZE
from tests.reliability.processes import build_model, command, prepared, start, wait
from tests.reliability.watching import faults_of, weights


def campaign(rounds: int, seed: int) -> tuple[int, list[str]]:
    """Let runs meet ``rounds`` times; returns how many of them were turned away, and what went wrong."""
    rng, wrong, turned_away = random.Random(seed), [], 0
    with prepared() as (work, _):
        build_model(work / "model", layers=4)
        (work / "whole").mkdir()
        whole = command(QUANTIZE, work / "whole", XDG_CACHE_HOME=str(work))
        assert whole.code == 0, whole.said
        expected = weights(work / "whole" / "out")
        for number in range(rounds):
            place = work / f"round-{number}"
            place.mkdir()
            # Pairs and threes in turn, and every second of each with --force.
            arguments = [*QUANTIZE, "--force"] if number % 4 >= 2 else QUANTIZE
            running = []
            for index in range(2 + number % 2):
                if index and number % 3:
                    time.sleep(rng.uniform(0, whole.seconds))
                log = place / f"log-{index}"
                running.append((start(arguments, place, log, {"XDG_CACHE_HOME": str(work)}), log))
            ends = [wait(process, log) for process, log in running]
            refused = [end for end in ends if end.code != 0]
            turned_away += len(refused)
            found = [f"exit {end.code}: {end.said}" for end in refused if end.code != 2 or not end.one_line]
            if len(refused) == len(ends):
                found.append("nobody made it")
            elif weights(place / "out") != expected or faults_of(place / "out"):
                found.append("the model is not whole")
            left = sorted(path.name for path in place.glob("out*"))
            wrong += [f"round {number}: {each}" for each in found + ([] if left == ["out"] else [f"left: {left}"])]
            shutil.rmtree(place)
    return turned_away, wrong


def main() -> int:
    """Run the campaign and print its summary line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    turned_away, wrong = campaign(asked.rounds, asked.seed)
    for each in wrong:
        print(each)
    print(f"at once, seed {asked.seed}: {asked.rounds} rounds, {turned_away} runs turned away, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
