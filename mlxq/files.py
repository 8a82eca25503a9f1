"""Files that must be whole: their hash, whether they can be written, the step in which they take their name."""

from __future__ import annotations

import hashlib
import os
import tempfile
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


def write_whole(file: Path, content: bytes) -> None:
    """Write ``file`` so that a reader sees the old one or the new one, never half; a pipe or device takes the bytes."""
    if file.exists() and not file.is_file():
        file.write_bytes(content)
        return
    # Written beside what a link leads to, so that it stays a link.
    target = Path(os.path.realpath(file))
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        rename_durably(Path(name), target)
    except BaseException:
        os.unlink(name)
        raise


def check_writable(file: Path) -> None:
    """Raise BadInputError where ``file`` could not be written, before there is anything to write."""
    try:
        if file.is_dir():
            raise BadInputError(f"cannot write {file}: it is a folder")
        folder = file.absolute().parent
        if not folder.is_dir():
            raise BadInputError(f"cannot write {file}: there is no folder {folder}", "Make it first.")
        if file.exists() and not file.is_file():
            return
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as exc:
        # A path with a NUL byte is refused by Python itself.
        raise BadInputError(f"cannot write {file}: {getattr(exc, 'strerror', None) or exc}") from exc


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
