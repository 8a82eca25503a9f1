"""Where output goes: data to stdout; progress, notes and errors to stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.markup import escape

from mlxq.errors import MlxqError

# Read by CI logs and pipes as wide as the tables are laid out for; a terminal says its own width.
PIPE_WIDTH = 120


def stdout() -> Console:
    """Console for data."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """Console for everything that is not data."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else PIPE_WIDTH, highlight=False)


def show(renderable: RenderableType) -> None:
    """Print data."""
    stdout().print(renderable)


def show_json(data: Any) -> None:
    """Print data as JSON, exactly as it is."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def show_text(text: str) -> None:
    """Print data exactly as it is, whatever the width."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def note(message: str, *, quiet: bool = False) -> None:
    """Say something in passing."""
    if not quiet:
        stderr().print(escape(message), style="dim", soft_wrap=True)


def warn(message: str) -> None:
    """Say something that should not be missed."""
    stderr().print(f"[yellow]note:[/] {escape(message)}", soft_wrap=True)


def show_error(error: MlxqError) -> None:
    """The one place where errors are rendered: what is wrong, then what to do."""
    console = stderr()
    for line in error.message.splitlines():
        console.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
    if error.hint:
        console.print(f"[cyan]hint:[/] {escape(error.hint)}", soft_wrap=True)
    if os.environ.get("MLXQ_DEBUG") == "1":
        console.print_exception()


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


class Meter(Protocol):
    """Takes how far a run is."""

    def update(self, done: int, total: int, what: str | None) -> None:
        """``done`` of ``total`` bytes, and what was just finished."""


class _Silent:
    def update(self, done: int, total: int, what: str | None) -> None:
        pass


class _Lines:
    """One line per tenth, for logs."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.began = time.monotonic()
        self.tenth = 0

    def update(self, done: int, total: int, what: str | None) -> None:
        tenth = done * 10 // max(total, 1)
        if tenth > self.tenth:
            self.tenth = tenth
            seconds = time.monotonic() - self.began
            rate = done / max(seconds, 1e-9) / 1e6
            amount = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
            note(f"{self.title} {tenth * 10:3d}%  {amount}  {rate:,.{0 if rate >= 10 else 1}f} MB/s  {seconds:.0f} s")


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Meter]:
    """A progress bar with bytes, rate and ETA on a terminal, a few lines elsewhere, nothing where quiet."""
    if quiet:
        yield _Silent()
    elif not sys.stderr.isatty():
        yield _Lines(title)
    else:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[what]}"),
        )
        with Progress(*columns, console=stderr(), transient=True) as bar:
            task = bar.add_task(title, total=None, what="")

            class Bar:
                def update(self, done: int, total: int, what: str | None) -> None:
                    bar.update(task, completed=done, total=total)
                    if what:
                        bar.update(task, what=what)

            yield Bar()


class StageMeter(Protocol):
    """Takes how far a run of several stages is."""

    def update(self, stage: str, done: int, total: int, eta_s: float | None) -> None:
        """``done`` of ``total`` steps of ``stage``, with about ``eta_s`` seconds left of it."""


class _SilentStages:
    def update(self, stage: str, done: int, total: int, eta_s: float | None) -> None:
        pass


class _StageLines:
    """One line as each stage begins, for logs."""

    def __init__(self) -> None:
        self.stage = ""

    def update(self, stage: str, done: int, total: int, eta_s: float | None) -> None:
        if stage != self.stage:
            self.stage = stage
            note(stage)


@contextmanager
def stages(title: str, *, quiet: bool = False) -> Iterator[StageMeter]:
    """A bar with the current stage and its ETA on a terminal, a line per stage elsewhere, nothing where quiet."""
    if quiet:
        yield _SilentStages()
    elif not sys.stderr.isatty():
        yield _StageLines()
    else:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("[dim]{task.fields[left]}"),
        )
        with Progress(*columns, console=stderr(), transient=True) as bar:
            task = bar.add_task(title, total=None, left="")

            class Bar:
                def update(self, stage: str, done: int, total: int, eta_s: float | None) -> None:
                    left = "" if eta_s is None else f"{eta_s:.0f} s left"
                    bar.update(task, description=stage, completed=done, total=total)
                    bar.update(task, left=left)

            yield Bar()
