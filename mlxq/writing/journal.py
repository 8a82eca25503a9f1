"""The journal of a folder being written: which plan, which steps are finished, and how much of them is on the disk.

A killed program loses nothing that it handed to the system, so every step noted since the machine started counts.
After power loss only what was synced counts: the journal's own lines may have reached the disk before the bytes they
speak of. Lines: ``plan`` (the first), ``boot`` (one a run), ``step``, ``synced`` with ``bytes``, ``replacing``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError
from mlxq.files import make_folder_durably, sync, sync_folder

NAME = "journal.jsonl"
# What file systems answer that have no locks: NFS without its lock service, Lustre mounted without flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Entries:
    """What a journal says.

    ``plan`` is the fingerprint of the plan, None where the first line is none of mlxq's. ``finished`` are steps that
    this boot of the machine has seen written; ``synced`` says how many bytes from the start of each shard are on the
    disk for certain. ``replacing`` says that an older model was being put aside. ``whole_bytes`` is where the last
    line ends that can be read.
    """

    plan: str | None = None
    finished: frozenset[str] = frozenset()
    synced: Mapping[str, int] = field(default_factory=dict)
    replacing: bool = False
    whole_bytes: int = 0


class Journal:
    """The journal in ``folder``, locked: nobody else writes there. Lines may be added from several threads."""

    def __init__(self, folder: Path) -> None:
        """Make it, and the folder, where there is none, and lock it.

        Raises BadInputError where another run has it, or the file system has no locks.
        """
        self.file = folder / NAME
        self._writing = threading.Lock()
        while True:
            make_folder_durably(folder)
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:  # a run that ended has just taken the folder away
                continue
            try:
                _lock(descriptor, folder)
                # A run that ended meanwhile has taken the file away with it: what was locked must be what is there.
                if _same(descriptor, self.file):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._descriptor = descriptor
        self.entries = read_entries(self.file)

    def begin(self, plan: str, *, afresh: bool) -> None:
        """Note that this run works on ``plan``. It is on the disk when this returns, before anything it speaks of."""
        os.ftruncate(self._descriptor, 0 if afresh else self.entries.whole_bytes)
        if afresh:
            self.note(plan=plan)
            if self.entries.replacing:
                self.note(replacing=True)
        self.note(boot=boot_id())
        self.sync()
        sync_folder(self.file.parent)

    def note(self, **line: object) -> None:
        """Add a line."""
        data = (json.dumps(line) + "\n").encode()
        with self._writing:
            while data:
                data = data[os.write(self._descriptor, data) :]

    def sync(self) -> None:
        """Bring the lines so far to the disk."""
        sync(self._descriptor)

    def forget(self) -> None:
        """Take back every line: nothing that they say can be relied on."""
        with self._writing:
            os.ftruncate(self._descriptor, 0)

    def remove(self) -> None:
        """Take the file away, and the folder where nothing else is in it; the lock is kept until ``close``."""
        self.file.unlink()
        # Another run may have begun there as soon as the file was gone.
        with contextlib.suppress(OSError):
            self.file.parent.rmdir()
        sync_folder(self.file.parent.parent)

    def remove_if_new(self) -> None:
        """``remove``, where nothing was begun."""
        if not self.file.read_bytes() and os.listdir(self.file.parent) == [NAME]:
            self.remove()

    def close(self) -> None:
        """Let go of the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_entries(file: Path) -> Entries:
    """Read a journal as far as its lines are whole: a crash may cut off the last, power loss may spoil any."""
    plan, replacing, whole = None, False, 0
    finished: set[str] = set()
    synced: dict[str, int] = {}
    this_boot = False
    for raw in file.read_bytes().splitlines(keepends=True):
        line = _parsed(raw)
        if line is None:
            break
        if whole == 0:
            if not isinstance(line.get("plan"), str):
                break
            plan = line["plan"]
        whole += len(raw)
        if isinstance(line.get("boot"), str):
            this_boot = line["boot"] == boot_id() != ""
        elif isinstance(line.get("step"), str) and this_boot:
            finished.add(line["step"])
        elif isinstance(line.get("synced"), str) and isinstance(line.get("bytes"), int):
            synced[line["synced"]] = max(line["bytes"], synced.get(line["synced"], 0))
        elif line.get("replacing") is True:
            replacing = True
    return Entries(plan, frozenset(finished), synced, replacing, whole)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """A whole line as an object, or None where it is none."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def boot_id() -> str:
    """What is different each time the machine starts; empty where the system does not say, and nothing equals it."""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=False
        )
        return asked.stdout.strip()
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux, or a sandbox that hides it
        return ""


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise BadInputError(f"another run is writing {folder} right now", "Wait for it, or choose another -o.") from exc
    except OSError as exc:
        if exc.errno not in _NO_LOCKS:
            raise
        raise BadInputError(
            f"the file system of {folder} has no locks, so two runs could write there at once",
            "Choose an -o on another disk, and move the model when it is made.",
        ) from exc


def _same(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False
