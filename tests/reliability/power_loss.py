"""Power loss at random moments of a run: what stands under the final name is whole, and the same command goes on.

    python -m tests.reliability.power_loss [--moments 100] [--seed 0] [--image]

Without ``--image``, a model of the worst that file systems may do: of each file and of each folder's list of names,
any state between the last sync and now may be what the disk holds, each on its own; a file that was never synced may
be empty, or zeros. With it (Linux, as root), a real ext4 on an image, copied as it is at the moment and mounted again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mlxq.pipeline import Finished, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import load_recipe
from mlxq.sources.resolve import resolve
from mlxq.writing import journal, trailing
from mlxq.writing.report import write_report
from tests.checkpoints import llama
from tests.reliability.watching import faults_of, watched, weights

Key = tuple[int, int]
IMAGE_BYTES = 24 << 20


class WorstDisk:
    """What may be on the disk of everything below ``root``: versions of each inode since its last sync."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.versions: dict[Key, list[bytes | dict[str, Key]]] = {}
        # Kept open, so that no number is given to another file while it is watched.
        self._held: dict[Key, int] = {}
        self.moments: list[dict[Key, list[bytes | dict[str, Key]]]] = []
        self._look(root)
        self.versions = {key: seen[-1:] for key, seen in self.versions.items()}

    def after(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Note a moment; a sync leaves one version."""
        self._look(self.root)
        if name == "fsync":
            found = os.fstat(arguments[0])
            key = (found.st_dev, found.st_ino)
            if key in self.versions:
                self.versions[key] = self.versions[key][-1:]
        self.moments.append({key: list(seen) for key, seen in self.versions.items()})

    def _look(self, path: Path) -> Key:
        held = os.open(path, os.O_RDONLY)
        found = os.fstat(held)
        key = (found.st_dev, found.st_ino)
        if key in self._held:
            os.close(held)
        else:
            self._held[key] = held
        now: bytes | dict[str, Key]
        if path.is_dir():
            now = {entry.name: self._look(entry) for entry in path.iterdir()}
            seen = self.versions.setdefault(key, [{}])
        else:
            now = path.read_bytes()
            seen = self.versions.setdefault(key, [b"", bytes(len(now))])
        if seen[-1] != now:
            seen.append(now)
        return key

    def lose_power(self, rng: random.Random, at: int, into: Path) -> None:
        """Write to ``into`` what the disk may hold after power was lost at moment ``at``."""
        found = self.root.stat()
        chosen = {key: rng.choice(seen) for key, seen in self.moments[at].items()}
        _write(chosen, (found.st_dev, found.st_ino), into)

    def close(self) -> None:
        """Let go of the files."""
        for held in self._held.values():
            os.close(held)


def _write(chosen: dict[Key, bytes | dict[str, Key]], key: Key, path: Path) -> None:
    content = chosen[key]
    if isinstance(content, bytes):
        path.write_bytes(content)
        return
    path.mkdir(exist_ok=True)
    for name, inner in content.items():
        _write(chosen, inner, path / name)


def make(plan: Plan, out: Path) -> Finished:
    """Make the model, whatever of mlxq's own stands there."""
    *_, last = run(plan, out, force=True)
    assert isinstance(last, Finished)
    return last


def make_and_note(plan: Plan, out: Path) -> None:
    """A whole run, and what is written into its report afterwards."""
    finished = make(plan, out)
    write_report({**finished.report, "not_asked": "has no tokenizer"}, finished.out)


def check(disk: Path, plan: Plan, whole: dict[str, str], old: dict[str, str] | None) -> list[str]:
    """What is wrong with a disk after power loss: what stands there, and what the same command makes of it."""
    out, kept = disk / "out", disk / "out.replaced"
    standing = weights(out) if out.exists() else None
    if standing is not None and standing not in (whole, old):
        return ["the final name has something half"]
    if standing is not None and (found := faults_of(out)):
        return found
    if old is not None and standing is None and not (kept.exists() and weights(kept) == old):
        return ["the old model is gone, and the new one does not stand"]
    with mock.patch.object(journal, "boot_id", return_value=f"after {disk}"):
        make(plan, out)
    left = sorted(path.name for path in disk.iterdir() if path.name.startswith("out"))
    if weights(out) != whole or left != ["out"]:
        return [f"the same command ends in something else: {left}"]
    return faults_of(out)


def sample(work: Path) -> tuple[Plan, Plan, dict[str, str], dict[str, str]]:
    """The plan under test, the plan of the model it replaces, and what both come to."""
    model = llama(work / "model", shards=2)
    plan, other = (prepare(load_recipe(name), resolve(str(model))) for name in ("4bit", "8bit"))
    for name, each in (("whole", plan), ("old", other)):
        make(each, work / name)
    return plan, other, weights(work / "whole"), weights(work / "old")


def in_a_model(moments: int, seed: int, work: Path) -> list[str]:
    """Lose power at ``moments`` moments of the worst disk; returns what went wrong."""
    rng, wrong = random.Random(seed), []
    plan, _, whole, old = sample(work)
    for replacing in (False, True):
        root = work / f"root-{replacing}"
        root.mkdir()
        if replacing:
            shutil.copytree(work / "old", root / "out")
        disk = WorstDisk(root)
        with mock.patch.object(trailing, "SYNC_BYTES", 1 << 14), watched(disk.after):
            make_and_note(plan, root / "out")
        for number in range(moments // 2):
            lost = work / f"lost-{replacing}-{number}"
            at = rng.randrange(len(disk.moments))
            disk.lose_power(rng, at, lost)
            found = check(lost, plan, whole, old if replacing else None)
            wrong += [f"replacing {replacing}, moment {at} of {len(disk.moments)}: {each}" for each in found]
            shutil.rmtree(lost)
        disk.close()
    return wrong


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """An image of a file system, mounted."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def on_an_image(moments: int, seed: int, work: Path) -> list[str]:
    """The same on ext4: the image is copied at ``moments`` moments, some of them after the command has ended."""
    rng, wrong = random.Random(seed), []
    plan, _, whole, old = sample(work)
    per_run = 10
    for number in range(-(-moments // per_run)):
        replacing = bool(number % 2)
        image = work / "disk.img"
        image.unlink(missing_ok=True)
        with image.open("wb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        copier = Copier(image, set(rng.sample(range(60), per_run - 2)))
        with mounted(image, work / "mounted") as place:
            if replacing:
                shutil.copytree(work / "old", place / "out")
            os.sync()
            with mock.patch.object(trailing, "SYNC_BYTES", 1 << 14), watched(copier.after):
                make_and_note(plan, place / "out")
            while len(copier.copies) < per_run:
                copier.copy()
        for index, copy in enumerate(copier.copies):
            with mounted(copy, work / "lost") as lost:
                found = check(lost, plan, whole, old if replacing else None)
            wrong += [f"run {number}, copy {index}: {each}" for each in found]
            copy.unlink()
    return wrong


class Copier:
    """Copies an image at the ``chosen`` calls of the system, counted from the first."""

    def __init__(self, image: Path, chosen: set[int]) -> None:
        self.image = image
        self.chosen = chosen
        self.count = 0
        self.copies: list[Path] = []

    def after(self, _name: str, _arguments: tuple[Any, ...]) -> None:
        """Count a call."""
        if self.count in self.chosen:
            self.copy()
        self.count += 1

    def copy(self) -> None:
        """Copy the image while nothing is written to it: until two copies are the same."""
        before = None
        while before != (now := self.image.read_bytes()):
            before = now
        self.copies.append(self.image.with_name(f"copy-{len(self.copies)}.img"))
        self.copies[-1].write_bytes(now)


def main() -> int:
    """Run the campaign and print its summary line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lose = on_an_image if asked.image else in_a_model
        wrong = lose(asked.moments, asked.seed, Path(folder))
    for each in wrong:
        print(each)
    kind = "ext4 image" if asked.image else "worst disk"
    print(f"power loss ({kind}), seed {asked.seed}: {asked.moments} moments, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
