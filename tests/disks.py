"""Disks of a size that a test chooses."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of ``nbytes`` mounted at ``folder``; skips where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        # Lazily: a failed test may still have files open there.
        subprocess.run(["umount", "-l", str(folder)], check=True)
