"""Spending a budget, with progress, and showing how it was spent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.show.console import console
from mlxq.show.meters import stages

if TYPE_CHECKING:
    from mlxq.budget.spend import Spending
    from mlxq.pipeline import Options
    from mlxq.planning.plan import Plan


def spend_budget(draft: Plan, options: Options, *, measure_curve: bool) -> tuple[Plan, Spending]:
    """Choose the formats that the recipe's budget leaves open."""
    import time

    from mlxq.budget.scoring import Scoring
    from mlxq.pipeline import allocated_plan

    for remark in draft.remarks:
        console.warn(remark)
    began, stage = time.monotonic(), ""
    with stages("Budget") as meter:
        for event in allocated_plan(draft, options, measure_curve=measure_curve):
            if not isinstance(event, Scoring):
                return event.plan, event.spending
            if event.stage != stage:
                began, stage = time.monotonic(), event.stage
            seconds = time.monotonic() - began
            left = seconds / event.done * (event.total - event.done) if event.done else None
            meter.update(event.stage, event.done, event.total, left)
    raise AssertionError("a budget ends with how it was spent")


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
            from mlxq.comparison.charts import save_figure, size_kl_curve

            save_figure(size_kl_curve(spending.facts()), plot)
            console.note(f"The curve is drawn in {plot}.")
        console.note("Nothing was written. Run it without --frontier to make the model.")
