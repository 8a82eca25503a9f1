"""The one sink: data to stdout; progress, notes and errors to stderr. It knows quiet, JSON, colour and width.

Whatever is printed passes through here, so here text that came from a file loses its control characters.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from mlxq.clean import clean, clean_json
from mlxq.errors import MlxqError

# Read by CI logs and pipes as wide as the tables are laid out for; a terminal says its own width.
PIPE_WIDTH = 120
# Of a line of an error, whose names and values may be of any length.
LONGEST_LINE = 1000


class _Cleaning(Console):
    """Renders text without what a terminal would obey; styles become escape sequences only after it."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)


class Sink:
    """Where a command's words go. ``quiet`` drops progress and notes; ``as_json`` says that data is to be JSON."""

    def __init__(self) -> None:
        self.quiet = False
        self.as_json = False

    def use(self, *, quiet: bool = False, as_json: bool = False) -> None:
        """How this command talks, as its options have it. Said once, where the command begins."""
        self.quiet, self.as_json = quiet, as_json

    def stdout(self) -> Console:
        """Console for data."""
        return _Cleaning(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)

    def stderr(self) -> Console:
        """Console for everything that is not data."""
        return _Cleaning(stderr=True, width=None if sys.stderr.isatty() else PIPE_WIDTH, highlight=False)

    @property
    def at_a_terminal(self) -> bool:
        """Whether progress can be drawn in place."""
        return sys.stderr.isatty()

    def show(self, renderable: RenderableType) -> None:
        """Print data."""
        self.stdout().print(renderable)

    def text(self, text: str) -> None:
        """Print data as it is, whatever the width."""
        cleaned = clean(text)
        sys.stdout.write(cleaned if cleaned.endswith("\n") else cleaned + "\n")

    def json(self, data: Any) -> None:
        """Print data as JSON (docs/json.md)."""
        sys.stdout.write(clean_json(json.dumps(data, indent=2, ensure_ascii=False)) + "\n")

    def note(self, message: str) -> None:
        """Say something in passing."""
        if not self.quiet:
            with contextlib.suppress(OSError):  # a full or closed stderr is no reason to stop
                self.stderr().print(escape(message), style="dim", soft_wrap=True)

    def warn(self, message: str) -> None:
        """Say something that should not be missed."""
        with contextlib.suppress(OSError):
            self.stderr().print(f"[yellow]note:[/] {escape(message)}", soft_wrap=True)

    def error(self, error: MlxqError, met: BaseException | None = None) -> None:
        """The one place where errors are rendered: what is wrong, then what to do.

        ``met`` is what was raised, where that is not ``error`` itself; MLXQ_DEBUG=1 shows where.
        """
        stderr = self.stderr()
        for line in error.message.splitlines():
            stderr.print(f"[bold red]error:[/] {escape(_shortened(line))}", soft_wrap=True)
        if error.hint:
            stderr.print(f"[cyan]hint:[/] {escape(_shortened(error.hint))}", soft_wrap=True)
        if os.environ.get("MLXQ_DEBUG") == "1":
            where = error if met is None else met
            stderr.print(escape("".join(traceback.format_exception(where))), soft_wrap=True)


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ..."


console = Sink()
