"""Finding a model and bringing it here, with what is waited for and fetched shown on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlxq.show.console import console
from mlxq.show.watch import watching

if TYPE_CHECKING:
    from pathlib import Path

    from mlxq.planning.plan import Plan
    from mlxq.sources.base import ModelSource


def find_model(model: str, *, trusted: bool = False, tokenizer: bool = False) -> ModelSource:
    """Open a model by its headers, telling what is waited for; its own code may run where it is ``trusted``."""
    from mlxq import api

    with watching() as tell:
        return api.find_model(model, trusted=trusted, tokenizer=tokenizer, on_event=tell)


def brought(source: ModelSource) -> ModelSource:
    """The same source with its files here, fetched with progress where it is on the Hub."""
    from mlxq import api

    with _kept(), watching() as tell:
        return api.brought(source, on_event=tell)


def brought_for(plan: Plan, out: Path) -> Plan:
    """The same plan with its source here, fetched where the disk has room for it and for ``out``."""
    from mlxq.pipeline import with_weights
    from mlxq.retry import told

    if plan.source.remote is None:
        return plan
    with _kept(), watching() as tell:
        return told(with_weights(plan, out), tell)


@contextmanager
def _kept() -> Iterator[None]:
    """Ctrl-C says what becomes of what was fetched."""
    try:
        yield
    except KeyboardInterrupt:
        console.warn(
            "stopped; files that are complete stay in the cache, and the same command continues with the others"
        )
        raise
