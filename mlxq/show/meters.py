"""How far a run is: a bar on a terminal, a few lines in a log, nothing where quiet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from mlxq.show.console import console


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
            console.note(
                f"{self.title} {tenth * 10:3d}%  {amount}  {rate:,.{0 if rate >= 10 else 1}f} MB/s  {seconds:.0f} s"
            )


@contextmanager
def progress(title: str) -> Iterator[Meter]:
    """A progress bar with bytes, rate and ETA on a terminal, a few lines elsewhere, nothing where quiet."""
    if console.quiet:
        yield _Silent()
    elif not console.at_a_terminal:
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
        with Progress(*columns, console=console.stderr(), transient=True) as bar:
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
            console.note(stage)


@contextmanager
def stages(title: str) -> Iterator[StageMeter]:
    """A bar with the current stage and its ETA on a terminal, a line per stage elsewhere, nothing where quiet."""
    if console.quiet:
        yield _SilentStages()
    elif not console.at_a_terminal:
        yield _StageLines()
    else:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("[dim]{task.fields[left]}"),
        )
        with Progress(*columns, console=console.stderr(), transient=True) as bar:
            task = bar.add_task(title, total=None, left="")

            class Bar:
                def update(self, stage: str, done: int, total: int, eta_s: float | None) -> None:
                    left = "" if eta_s is None else f"{eta_s:.0f} s left"
                    bar.update(task, description=stage, completed=done, total=total)
                    bar.update(task, left=left)

            yield Bar()
