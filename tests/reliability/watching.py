"""Look on while a program in this process changes files: a call after each step that power loss could come between."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mlxq.files import NEW, sha256_file
from mlxq.headers import read_json

CHANGES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate")


@contextlib.contextmanager
def watched(after: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``after`` with the name and arguments of each call of the system in CHANGES, once it is done."""
    alone = threading.RLock()

    def watching(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **named: Any) -> Any:
            with alone:
                result = call(*arguments, **named)
                after(name, arguments)
                return result

        return made

    with contextlib.ExitStack() as stack:
        for name in CHANGES:
            stack.enter_context(mock.patch.object(os, name, watching(name, getattr(os, name))))
        if hasattr(fcntl, "F_FULLFSYNC"):
            # macOS's own way to the disk; without it, fsync is what is called.
            full = fcntl.F_FULLFSYNC
            stack.callback(setattr, fcntl, "F_FULLFSYNC", full)
            del fcntl.F_FULLFSYNC
        yield


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model but those that tell of the run, and what was to become their next version."""
    told = ("mlxq.json", "README.md")
    skipped = {*told, *(name + NEW for name in told)}
    return {f.name: sha256_file(f) for f in folder.iterdir() if f.name not in skipped}


def faults_of(folder: Path) -> list[str]:
    """What is wrong with a finished model, by its own ``mlxq.json``."""
    report = read_json(folder / "mlxq.json")
    found = []
    for name, facts in report["files"].items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} is missing")
        elif sha256_file(file) != facts["sha256"]:
            found.append(f"{name} differs")
    return found
