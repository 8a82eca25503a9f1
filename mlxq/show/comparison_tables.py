"""A comparison as tables: what each model costs, how far it is, what it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from mlxq.comparison.report import best_names
from mlxq.metrics.metric import chosen, with_error_text
from mlxq.show.tables import plain_table, size_text

if TYPE_CHECKING:
    from mlxq.comparison.result import Comparison


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Size, speed and memory; then the distance from the reference. Best values are marked with a star.

    A comparison has more columns than 120 characters hold: so one table for what a model costs, one for how far it is.
    """
    return [
        _comparison_table(comparison, "cost", "Cost"),
        _comparison_table(comparison, "distance", f"Distance from {comparison.reference.name}"),
    ]


def _comparison_table(comparison: Comparison, kind: str, title: str) -> Table:
    shown = chosen(lambda metric: metric.table == kind, [result.metrics() for result in comparison.results])
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for metric in shown:
        table.add_column(metric.label, justify="right")
    for result in comparison.results:
        cells = []
        for metric in shown:
            text = with_error_text(metric.name, result.metrics())
            best = result.name in best_names(comparison, metric.name)
            cells.append(f"[bold green]*{text}[/]" if best else text)
        mark = " (reference)" if result is comparison.reference else " (tied)" if result.tied else ""
        table.add_row(escape(result.name) + mark, *cells)
    return table


def answer_tables(comparison: Comparison) -> list[Table]:
    """One table per prompt: every model's answer, with its speed and peak memory."""
    timed = [(result.name, result.speed.answers) for result in comparison.results if result.speed]
    tables = []
    for index in range(max((len(answers) for _, answers in timed), default=0)):
        table = plain_table("model", "answer", "tokens/s", "memory", right=("tokens/s", "memory"))
        table.title = escape(timed[0][1][index].prompt)
        for name, answers in timed:
            answer = answers[index]
            memory = size_text(answer.peak_memory_bytes)
            table.add_row(escape(name), escape(answer.text), f"{answer.generation_tps:.1f}", memory)
        tables.append(table)
    return tables
