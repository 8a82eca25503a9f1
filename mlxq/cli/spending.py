"""Spending a budget, with progress, and showing how it was spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.cli.fetching import brought_for
from mlxq.show.console import console
from mlxq.show.watch import watching

if TYPE_CHECKING:
    from mlxq.budget.spend import Spending
    from mlxq.planning.plan import Plan


def spend_budget(draft: Plan, out: Path, *, measure_curve: bool) -> tuple[Plan, Spending]:
    """Choose the formats that the recipe's budget leaves open, with progress."""
    from mlxq import api

    for remark in draft.remarks:
        console.warn(remark)
    with watching() as tell:
        allocated = api.spent(brought_for(draft, out), out, measure_curve=measure_curve, on_event=tell)
    return allocated.plan, allocated.spending


def show_spending(spending: Spending, *, explain: bool, frontier: bool, plot: Path | None) -> None:
    """Print what the budget came to, what it was held against, and on request the curve and the reasons."""
    from mlxq.show import budget_tables

    for line in budget_tables.spending_lines(spending):
        console.show(line)
    if spending.checks:
        console.show(budget_tables.checks_table(spending))
    if explain:
        console.show(budget_tables.bits_table(spending))
        console.show(budget_tables.bought_table(spending))
        console.show(budget_tables.next_line(spending))
    if frontier:
        console.show(budget_tables.curve_table(spending.curve, predicted=spending.text is not None))
        if plot is not None:
            from mlxq.cli.keeping import write_or_keep
            from mlxq.writing.pictures import drawn, size_kl_curve

            write_or_keep(plot, drawn(size_kl_curve(spending.facts()), plot.suffix))
            console.note(f"The curve is drawn in {plot}.")
        console.note("Nothing was written. Run it without --frontier to make the model.")
