"""What is said on stderr while a model is found and brought here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from mlxq.show.console import console
from mlxq.show.meters import Meter, progress

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from mlxq.planning.plan import Plan
    from mlxq.retry import Waiting
    from mlxq.sources.base import ModelSource
    from mlxq.sources.download import Downloading
    from mlxq.sources.resolve import Event
    from mlxq.sources.sample import Fetching

_T = TypeVar("_T")


def say_waiting(event: Waiting) -> None:
    """Say on stderr that something lets one wait."""
    console.warn(f"{event.reason}; trying again in {event.seconds:.0f} s")


@contextmanager
def telling() -> Iterator[Callable[[Event], None]]:
    """Within the context, what it gives takes the events of ``resolve``, and shows them as notes and progress."""
    from mlxq.retry import Waiting
    from mlxq.sources.download import Downloading

    meter: Meter | None = None
    with ExitStack() as shown:

        def tell(event: Event) -> None:
            nonlocal meter
            if isinstance(event, Waiting):
                say_waiting(event)
            elif isinstance(event, Downloading):
                assert meter is not None, "what is fetched is announced"
                meter.update(event.done_bytes, event.total_bytes, event.file)
            else:
                shown.close()
                console.note(_announced(event))
                meter = shown.enter_context(progress("Fetching"))

        yield tell


def _announced(event: Fetching) -> str:
    sample = event.sample
    what = (
        f"fetching {sample.title} ({sample.licence}), {event.nbytes / 1e6:,.1f} MB, from {event.origin}; "
        f"it is kept in {event.folder}"
    )
    return f"{event.because}; {what}" if event.because else what


def find_model(model: str, *, trusted: bool = False, tokenizer: bool = False) -> ModelSource:
    """Open a model by its headers, telling what is waited for; its own code may run where it is ``trusted``.

    ``tokenizer`` has the tokenizer fetched with them where the model is on the Hub.
    """
    from mlxq.sources.resolve import resolve

    with telling() as tell:
        return resolve(model, tokenizer=tokenizer, trusted=trusted, on_event=tell)


def brought(source: ModelSource) -> ModelSource:
    """The same source with its files here: where it is on the Hub they are fetched into the cache, with progress."""
    from mlxq.sources.download import fetch

    return source if source.remote is None else _fetched(fetch(source), source.name)


def fetched(plan: Plan, out: Path) -> Plan:
    """The same plan with its source here, fetched with progress where it is on the Hub."""
    from mlxq.pipeline import with_weights

    if plan.source.remote is None:
        return plan
    return _fetched(with_weights(plan, out), plan.source.name)


def _fetched(events: Generator[Downloading | Waiting, None, _T], name: str) -> _T:
    """Run a download to its end, with progress; returns what it returns."""
    from mlxq.retry import Waiting

    try:
        with progress(f"Fetching {name}") as meter:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    found: _T = stop.value
                    return found
                if isinstance(event, Waiting):
                    say_waiting(event)
                else:
                    meter.update(event.done_bytes, event.total_bytes, event.file)
    except KeyboardInterrupt:
        console.warn(
            "stopped; files that are complete stay in the cache, and the same command continues with the others"
        )
        raise
