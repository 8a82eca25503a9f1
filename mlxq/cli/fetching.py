"""Finding a model and bringing it here, with what is waited for and fetched shown on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxq.show.console import console
from mlxq.show.watch import watching

if TYPE_CHECKING:
    from pathlib import Path

    from mlxq.planning.plan import Plan
    from mlxq.sources.base import ModelSource

_KEPT = "stopped; files that are complete stay in the cache, and the same command continues with the others"


def find_model(model: str, *, trusted: bool = False, tokenizer: bool = False) -> ModelSource:
    """Open a model by its headers, telling what is waited for; its own code may run where it is ``trusted``."""
    from mlxq import api

    with watching() as tell:
        return api.find_model(model, trusted=trusted, tokenizer=tokenizer, on_event=tell)


def brought(plan: Plan, out: Path) -> Plan:
    """The same plan with the files of its source here, fetched with progress where they are on the Hub."""
    from mlxq.pipeline import with_weights
    from mlxq.retry import told

    if plan.source.remote is None:
        return plan
    try:
        with watching() as tell:
            return told(with_weights(plan, out), tell)
    except KeyboardInterrupt:
        console.warn(_KEPT)
        raise
