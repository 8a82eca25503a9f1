"""What is said on stderr while something is under way: each kind of event, shown in one place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mlxq.show.console import console
from mlxq.show.interrupts import interrupts
from mlxq.show.meters import Meter, StageMeter, progress, stages

if TYPE_CHECKING:
    from mlxq.api import Event
    from mlxq.sources.sample import Fetching


@contextmanager
def watching(title: str = "") -> Iterator[Callable[[Event], None]]:
    """Within the context, what it gives takes events and shows them; ``title`` heads the bar of what is written.

    It raises KeyboardInterrupt once Ctrl-C was pressed, wherever Python dropped the exception itself.
    """
    with interrupts() as stop_if_pressed, ExitStack() as shown:
        watcher = _Watcher(title, shown)

        def tell(event: Event) -> None:
            # The Hub is asked from several threads, and a key press is for the one that waits for them.
            if threading.current_thread() is threading.main_thread():
                stop_if_pressed()
            watcher.tell(event)

        yield tell


class _Watcher:
    """One bar at a time, in ``shown``: another kind of event closes it and opens its own."""

    def __init__(self, title: str, shown: ExitStack) -> None:
        self.title = title
        self.shown = shown
        self.kind = ""
        self.meter: Any = None
        self.written = (0, 0)
        self.stage, self.began = "", 0.0

    def tell(self, event: Event) -> None:
        from mlxq.budget.scoring import Remark, Scoring
        from mlxq.comparison.measure import Comparison, Measuring
        from mlxq.pipeline import Resumed
        from mlxq.publish.check import Checked
        from mlxq.publish.publish import Doing
        from mlxq.retry import Waiting
        from mlxq.sources.download import Downloading
        from mlxq.sources.sample import Fetching
        from mlxq.writing.execute import Written

        shows: dict[type, Callable[[Any], None]] = {
            Waiting: lambda e: console.warn(f"{e.reason}; trying again in {e.seconds:.0f} s"),
            Fetching: self._announce,
            Downloading: self._downloading,
            Written: self._written,
            Resumed: self._resumed,
            Remark: lambda e: console.warn(e.text),
            Scoring: self._scoring,
            Measuring: lambda e: self._stages("Comparing").update(f"{e.stage}: {e.model}", e.done, e.total, e.eta_s),
            Comparison: self._compared,
            Checked: self._checked,
            Doing: lambda e: console.note(e.what),
        }
        shows[type(event)](event)

    def _bar(self, title: str) -> Meter:
        if self.kind != title:
            self.shown.close()
            self.kind, self.meter = title, self.shown.enter_context(progress(title))
        meter: Meter = self.meter
        return meter

    def _stages(self, title: str) -> StageMeter:
        if self.kind != title:
            self.shown.close()
            self.kind, self.meter = title, self.shown.enter_context(stages(title))
        meter: StageMeter = self.meter
        return meter

    def _announce(self, event: Fetching) -> None:
        self.shown.close()
        self.kind = ""
        sample = event.sample
        what = (
            f"fetching {sample.title} ({sample.licence}), {event.nbytes / 1e6:,.1f} MB, from {event.origin}; "
            f"it is kept in {event.folder}"
        )
        console.note(f"{event.because}; {what}" if event.because else what)

    def _downloading(self, event: Any) -> None:
        if self.kind and self.kind == self.title:
            # Fetched file by file while it is written.
            self._bar(self.title).update(*self.written, f"fetching {event.file or 'the small files'}")
        else:
            self._bar("Fetching").update(event.done_bytes, event.total_bytes, event.file)

    def _written(self, event: Any) -> None:
        self.written = (event.written_bytes, event.total_bytes)
        self._bar(self.title).update(event.written_bytes, event.total_bytes, event.finished)

    def _resumed(self, event: Any) -> None:
        if event.discarded:
            console.warn(f"{event.folder} held {event.discarded}; it was started afresh")
        else:
            console.note(f"continuing {event.folder}: {event.step_count} tensors were finished")

    def _scoring(self, event: Any) -> None:
        if event.stage != self.stage:
            self.stage, self.began = event.stage, time.monotonic()
        seconds = time.monotonic() - self.began
        left = seconds / event.done * (event.total - event.done) if event.done else None
        self._stages("Budget").update(event.stage, event.done, event.total, left)

    def _compared(self, event: Any) -> None:
        newest = event.results[-1]
        if newest.not_timed is not None:
            console.warn(f"{newest.name}: speed not measured: {newest.not_timed}")

    def _checked(self, event: Any) -> None:
        for problem in event.problems:
            console.warn(f"{problem}; published all the same, as --force asks")
        for name in event.left_out:
            console.warn(f"{name} was not written by mlxq, so it is left out")
