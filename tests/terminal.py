"""A program at a pseudo-terminal: what it shows, and keys pressed while it runs."""

from __future__ import annotations

import os
import pty
import re
import select
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CTRL_C = b"\x03"

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Session:
    """How a program ended and what it left on the screen, control sequences taken out."""

    exit_code: int
    screen: str


def at_a_terminal(command: list[str], folder: Path, *, press: bytes, when: Callable[[], bool]) -> Session:
    """Run ``command`` in ``folder`` at a terminal, and press ``press`` as soon as ``when()`` is true."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": "200"})
    shown, pressed = b"", False
    while True:
        if not pressed and when():
            os.write(terminal, press)
            pressed = True
        if select.select([terminal], [], [], 0.001)[0]:
            try:
                piece = os.read(terminal, 1 << 16)
            except OSError:  # Linux's way of saying that the other end is closed.
                break
            if not piece:
                break
            shown += piece
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return Session(os.waitstatus_to_exitcode(status), _CONTROL.sub("", shown.decode(errors="replace")))
