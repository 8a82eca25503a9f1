"""What verifying a model folder found, as a short table, one line, and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mlxq.show.tables import facts_table, plain_table

if TYPE_CHECKING:
    from mlxq.sources.soundness import Unsound
    from mlxq.writing.fidelity import TensorError
    from mlxq.writing.verify import Check


def verify_table(checks: Sequence[Check]) -> Table:
    """A row a check: whether it holds, and what was looked at."""
    table = facts_table()
    for check in checks:
        count = len(check.faults)
        state = f"[red]{count} {'fault' if count == 1 else 'faults'}[/]" if count else "[green]ok[/]"
        table.add_row(check.name, state, escape(check.found))
    return table


def verdict(folder: Path, checks: Sequence[Check], errors: Sequence[TensorError]) -> str:
    """The one line at the end of what holds."""
    line = f"{folder} is whole: {', '.join(check.name for check in checks)}"
    # Of tensors that may differ, the one that comes nearest to what is allowed.
    nearest = max((e for e in errors if e.allowed), key=lambda e: e.error / e.allowed, default=None)
    if nearest is None:
        return line
    return f"{line}; nearest to its bound is {nearest.path} ({nearest.error:.3g} of {nearest.allowed:.3g})"


def verify_facts(folder: Path, checks: Sequence[Check], errors: Sequence[TensorError]) -> dict[str, Any]:
    """The same as data, for ``--json``."""
    return {
        "schema": "mlxq.verify",
        "schema_version": 1,
        "folder": str(folder),
        "whole": not any(check.faults for check in checks),
        "checks": [asdict(check) for check in checks],
        "tensors": [asdict(error) for error in errors],
    }


def unsound_table(found: Sequence[Unsound]) -> Table:
    """The tensors of a model that hold no finite numbers."""
    table = plain_table("tensor", "NaN", "infinite", "first row", right=("NaN", "infinite", "first row"))
    for tensor in found:
        table.add_row(escape(tensor.tensor), f"{tensor.nan:,}", f"{tensor.infinite:,}", f"{tensor.first_row:,}")
    return table
