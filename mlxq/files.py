"""Files that must be whole: their hash, what tells of a change, the step in which they take their name, pointers."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxq.errors import BadInputError

# What a file being written is called until it is whole.
NEW = ".new"
# What a file system answers that does not offer a call.
_NOT_OFFERED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
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


@dataclass(frozen=True)
class FileState:
    """What changes whenever a file does: its times in nanoseconds, the change time among them, which nobody can set.

    A file that takes another's place has another ``inode``.
    """

    nbytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> FileState | None:
        """The state of what ``file`` leads to; None where it leads to no file."""
        if not file.is_file():
            return None
        found = file.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def states_of(files: Iterable[Path]) -> dict[Path, FileState]:
    """The state of each that is a file."""
    return {file: state for file in files if (state := FileState.of(file)) is not None}


def rename_durably(written: Path, file: Path) -> None:
    """Give ``written`` the name ``file``, on the same file system; after power loss it is there whole or not at all."""
    sync_file(written)
    os.replace(written, file)
    sync_folder(file.parent)


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


def write_durably(file: Path, content: bytes) -> None:
    """Write a file so that a reader, and power loss, find the old one or the new one, never half."""
    temporary = file.with_name(file.name + NEW)
    try:
        temporary.write_bytes(content)
        rename_durably(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder_durably(folder: Path) -> None:
    """Make a folder and those above it; each that is new is on the disk when this returns."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


def sync(descriptor: int) -> None:
    """Bring a file to the disk itself: macOS's ``fsync`` ends at the drive's own memory, and F_FULLFSYNC does not."""
    # Here and not above: Windows has no such module, and mlxq says there in one line that it does not run.
    import fcntl

    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as exc:
            if exc.errno not in _NOT_OFFERED:
                raise
    os.fsync(descriptor)


def sync_file(file: Path) -> None:
    """Bring a file to the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where it can be read and its file system offers that (SMB does not)."""
    try:
        sync_file(folder)
    except OSError as exc:
        if exc.errno not in (*_NOT_OFFERED, errno.EACCES):
            raise
