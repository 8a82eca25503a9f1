"""Files that a stranger made, read with no trust in what they are: a file, not larger than it can be, and UTF-8.

A pipe, a device or a socket under the name of a file would hold a read for ever or feed it without end, so what is
opened is looked at before a byte of it is read, and no more is read than the limit of its kind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mlxq.errors import BadInputError

# A config, an index, a report or a card: the largest known, the index of a model of 150,000 tensors, has 15 MB.
MAX_SMALL_BYTES = 32 << 20
# The largest known tokenizer.json has 33 MB.
MAX_TOKENIZER_BYTES = 128 << 20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """``file`` open for reading, once it is sure that it is a regular file. Raises BadInputError where it is not."""
    try:
        # Without O_NONBLOCK the open of a pipe waits for somebody to write to it.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as exc:
        raise unreadable(file, exc) from exc
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise BadInputError(f"cannot read {file}: it is {kind}, not a file")
    with os.fdopen(descriptor, "rb") as stream:
        yield stream


def read_bytes(file: Path, limit: int = MAX_SMALL_BYTES) -> bytes:
    """The content of ``file``. Raises BadInputError for what is no file, cannot be read, or is over ``limit`` bytes."""
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise BadInputError(f"cannot read {file}: it has {size:,} bytes, and at most {limit:,} are read")
        try:
            # A file of /proc has no size, and one that grows has another by now.
            content = stream.read(limit + 1)
        except OSError as exc:
            raise unreadable(file, exc) from exc
    if len(content) > limit:
        raise BadInputError(f"cannot read {file}: it has over {limit:,} bytes, more than are read of its kind")
    return content


def read_text(file: Path, limit: int = MAX_SMALL_BYTES) -> str:
    """As ``read_bytes``, as text. Raises BadInputError where it is not UTF-8 too."""
    try:
        return read_bytes(file, limit).decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadInputError(f"{file} is not UTF-8 text (byte {exc.start})") from exc


def unreadable(file: Path | str, exc: OSError | ValueError) -> BadInputError:
    """Why the system would not read ``file``, in one line."""
    # A path with a NUL byte or half a surrogate pair is refused by Python itself, with ValueError.
    reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
    return BadInputError(f"cannot read {file}: {reason}")
