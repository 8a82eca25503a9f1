"""A disk of every size up to what is needed: one clear line, nothing half, and with room the same command goes on.

    python -m tests.reliability.disk_full [--sizes 36]

Needs to mount file systems (Linux, as root); says so where it may not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tests.reliability.kills import QUANTIZE
from tests.reliability.processes import build_model, command, prepared
from tests.reliability.watching import faults_of, weights

BLOCK = 4096
# The score cache, the log and temporary files of a run must not take room of the disk under test.
OTHER_DISK = "XDG_CACHE_HOME"


def may_mount(place: Path) -> bool:
    """Whether a small file system can be mounted here."""
    place.mkdir()
    try:
        mounted = subprocess.run(_mount(place, 1 << 20), capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False
    if mounted:
        subprocess.run(["umount", place], check=True)
    return mounted


def campaign(sizes: int) -> tuple[bool, int, list[str]]:
    """Try ``sizes`` disks; returns whether one may mount at all, how many were too small, and what went wrong."""
    wrong, too_small = [], 0
    with prepared() as (work, _):
        if not may_mount(work / "trial"):
            return False, 0, []
        build_model(work / "model", layers=4)
        (work / "whole").mkdir()
        ended = command(QUANTIZE, work / "whole", **{OTHER_DISK: str(work)})
        assert ended.code == 0, ended.said
        expected = weights(work / "whole" / "out")
        needed = sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in (work / "whole" / "out").iterdir())
        for number in range(sizes):
            # From nothing to a little more than enough, with the last steps as fine as one block.
            blocks = 2 + (needed // BLOCK + 8) * number // max(1, sizes - 1)
            place = work / f"disk-{number}"
            place.mkdir()
            log = work / f"log-{number}"
            log.mkdir()
            subprocess.run(_mount(place, blocks * BLOCK), check=True)
            try:
                (place / "model").symlink_to(work / "model")
                here = [part.replace("../model", str(work / "model")) for part in QUANTIZE]
                here[here.index("out")] = str(place / "out")
                ended = command(here, log, **{OTHER_DISK: str(work)})
                too_small += ended.code != 0
                found = []
                if ended.code not in (0, 1) or (ended.code == 1 and not ended.one_line):
                    found.append(f"exit {ended.code}: {ended.said}")
                if (place / "out").exists() != (ended.code == 0):
                    found.append("the final name stands after a failure, or does not after success")
                if ended.code != 0:
                    subprocess.run(["mount", "-o", f"remount,size={2 * needed + (1 << 20)}", place], check=True)
                    again = command(here, log, **{OTHER_DISK: str(work)})
                    found += [] if again.code == 0 else [f"fails with room, too: {again.said}"]
                if not found and (weights(place / "out") != expected or faults_of(place / "out")):
                    found.append("ends in something else")
                wrong += [f"{blocks * BLOCK:,} bytes: {each}" for each in found]
            finally:
                subprocess.run(["umount", "-l", place], check=True)
            shutil.rmtree(log)
    return True, too_small, wrong


def _mount(place: Path, nbytes: int) -> list[str | Path]:
    return ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", place]


def main() -> int:
    """Run the campaign and print its summary line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, default=36)
    asked = parser.parse_args()
    mounts, too_small, wrong = campaign(asked.sizes)
    for each in wrong:
        print(each)
    if not mounts:
        print("disk full: skipped, mounting a small file system is not permitted here")
        return 0
    print(f"disk full: {asked.sizes} sizes, {too_small} of them too small, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
