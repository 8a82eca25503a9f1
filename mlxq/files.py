"""Files that must be whole: their hash, and the one step in which they take their name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256_file(file: Path) -> str:
    """SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


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
