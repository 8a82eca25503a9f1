"""Ctrl-C, noticed even where Python drops it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Within the context, call what it gives now and then: it raises KeyboardInterrupt if Ctrl-C was pressed.

    Python drops an exception that strikes inside a destructor or a callback of C code, and with it the key press.
    """
    pressed = False

    def remember(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
