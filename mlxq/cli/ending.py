"""How a command ends: its exit code, and one line for whatever it met.

Errors are explained where they are understood. What reaches this place was not: an ``OSError`` on some path, output
that nobody takes, and faults of mlxq itself, which end as one line too and are never mistaken for a person's.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from mlxq.errors import BadInputError, MlxqError

# A path that cannot be, as opposed to a disk or a right that is missing.
_BAD_PATHS = {
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
}
_FULL = {errno.ENOSPC, errno.EDQUOT}
INTERRUPTED, NO_READER = 130, 141
STDOUT = "stdout"


def ended(command: Callable[[], object]) -> int:
    """Run ``command``; what it raises becomes one line on stderr. Returns the exit code."""
    _whole_streams()
    code, met = 0, None
    try:
        command()
    except SystemExit as exc:
        # The parser of the command line ends this way, also where nobody read what it printed.
        code, met = exc.code if isinstance(exc.code, int) else 1, exc.__context__
        if not isinstance(met, BrokenPipeError):
            met = None
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as exc:
        met = exc
    unsaid = _unsaid()
    if isinstance(unsaid, BrokenPipeError) or (unsaid is None and isinstance(met, BrokenPipeError)):
        # The reader of our output went away (mlxq ... | head): not an error, but nothing more can be said.
        return NO_READER
    met = met or unsaid
    if met is not None:
        error = explained(met)
        _say(error, met)
        code = error.exit_code
    try:
        sys.stderr.flush()
    except OSError:
        _let_go(2)
    return code


def explained(met: BaseException) -> MlxqError:
    """The one line for what a command met."""
    if isinstance(met, MlxqError):
        return met
    if isinstance(met, OSError):
        return _explained_os_error(met)
    if isinstance(met, MemoryError):
        return MlxqError("out of memory", "Close other programs, or take a smaller model.")
    if isinstance(met, UnicodeError):
        return BadInputError(f"a name or a text is not UTF-8: {met}")
    return MlxqError(
        f"{type(met).__name__}: {' '.join(str(met).split())}: this is a fault of mlxq",
        "MLXQ_DEBUG=1 shows where it is; please report it.",
    )


def _explained_os_error(met: OSError) -> MlxqError:
    reason = met.strerror or str(met)
    path = met.filename
    if path is None or isinstance(path, int):
        return MlxqError(f"the system refused: {reason}")
    named = os.fsdecode(path) if isinstance(path, str | bytes) else str(path)
    if named == STDOUT or met.errno in _FULL:
        return MlxqError(f"cannot write {named}: {reason}")
    kind = BadInputError if met.errno in _BAD_PATHS else MlxqError
    return kind(f"cannot read or write {named}: {reason}")


class _Stdout(io.FileIO):
    """Stdout, which says that it is what fails."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as exc:
            raise OSError(exc.errno, exc.strerror, STDOUT) from exc


def _unsaid() -> OSError | None:
    """Why stdout did not take all that was printed, or None where it did; nothing more is tried on it then."""
    try:
        sys.stdout.flush()
    except OSError as exc:
        _let_go()
        return exc
    return None


def _let_go(stream: int = 1) -> None:
    """Give what a stream still holds to nobody: Python would try it again as it ends, and complain."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, stream)
    os.close(nobody)


def _say(error: MlxqError, met: BaseException) -> None:
    from mlxq.show.console import console

    try:
        console.error(error, met)
    except OSError:
        # A full or closed stderr: the exit code is all that can be said.
        return


def _whole_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr something in their place.

    Files that it opens would else take their numbers. Stdout becomes one that takes nothing, so that a result which
    nobody can have is an error, as it is on a full disk.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    if sys.stdout is not sys.__stdout__:
        # Somebody who runs a command inside a program of their own takes what it prints.
        return
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    # Where the terminal's encoding has no such letter, its escape is shown.
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Stdout(1, "wb", closefd=False)), encoding, "backslashreplace", line_buffering=os.isatty(1)
    )
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "wb", closefd=False), "utf-8", "backslashreplace", write_through=True
        )
