"""Files that must be whole: their hash, the one step in which they take their name, and those that never came."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from mlxq.errors import BadInputError

# What a file of a Git repository begins with where its content was never fetched (Git LFS specification, pointers).
_POINTER = b"version https://git-lfs.github.com/spec/v1"


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def refuse_pointer(name: str | Path, start: bytes) -> None:
    """Raise BadInputError where a file that begins with ``start`` is a Git LFS pointer: a note in place of content."""
    if start.startswith(_POINTER):
        raise BadInputError(
            f"{name} is a Git LFS pointer, not the file itself",
            "Fetch what it stands for: git lfs pull, in the folder of the repository.",
        )


def refuse_pointers(files: Mapping[str, Path | bytes]) -> None:
    """As ``refuse_pointer``, of files by name, given as content or where it lies."""
    for name, content in files.items():
        if isinstance(content, bytes):
            refuse_pointer(name, content)
        else:
            with content.open("rb") as stream:
                refuse_pointer(content, stream.read(len(_POINTER)))


def rename_durably(written: Path, file: Path) -> None:
    """Give ``written`` the name ``file``, on the same file system; after power loss it is there whole or not at all."""
    _flush(written)
    os.replace(written, file)
    _flush(file.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
