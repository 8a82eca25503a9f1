"""What took an hour to measure is not lost to a full disk: it is written somewhere else, and said where."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from mlxq.errors import MlxqError
from mlxq.files import write_whole


def write_or_keep(file: Path, content: bytes) -> None:
    """Write ``file``. Raises MlxqError where that fails, naming the place where the content is kept instead."""
    try:
        write_whole(file, content)
    except OSError as exc:
        raise kept_elsewhere(f"cannot write {file}: {exc.strerror}", file.name, content) from exc


def kept_elsewhere(fault: str, name: str, content: bytes) -> MlxqError:
    """The error for ``fault``, once ``content`` is in the first folder that takes it: this one, temporary, home."""
    for folder in (Path.cwd, lambda: Path(tempfile.gettempdir()), Path.home):
        with contextlib.suppress(OSError, RuntimeError):
            descriptor, place = tempfile.mkstemp(prefix="mlxq-", suffix=f"-{name[-60:]}", dir=folder())
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(content)
            except OSError:
                os.unlink(place)
                continue
            return MlxqError(fault, f"What was measured is kept in {place}.")
    return MlxqError(fault, "No other folder takes what was measured either.")
