"""Results as HTML, for a notebook: the tables of the terminal, and pictures where there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxq.api import Inspected
from mlxq.clean import clean
from mlxq.comparison.result import Comparison, verdict
from mlxq.pipeline import Finished
from mlxq.planning.plan import Plan
from mlxq.shown import Shown

if TYPE_CHECKING:
    from rich.style import Style


def as_html(result: Shown) -> str:
    """A result as HTML that asks nothing of any network and runs nothing; what came from files is escaped."""
    draws: Mapping[type, Callable[[Any], Iterator[str]]] = {
        Inspected: _inspected,
        Plan: _plan,
        Finished: _finished,
        Comparison: _comparison,
    }
    return f"<div>{''.join(draws[type(result)](result))}</div>"


def _inspected(found: Inspected) -> Iterator[str]:
    from mlxq.show import inspection_tables as tables

    yield table_html(tables.inspection_table(found.inspection))
    yield table_html(tables.module_table(found.inspection.modules, folded=True))
    if found.encoding is not None:
        yield table_html(tables.encoding_table(found.encoding))
    yield _line(tables.fit_heading(found.device, found.context))
    yield table_html(tables.fit_table(found.fits, found.device))


def _plan(plan: Plan) -> Iterator[str]:
    from mlxq.show import plan_tables

    yield table_html(plan_tables.plan_table(plan))
    yield from map(_line, plan_tables.plan_summary(plan))
    if plan.spending is not None:
        yield _curve(plan.spending)


def _finished(finished: Finished) -> Iterator[str]:
    from mlxq.show import plan_tables

    yield table_html(plan_tables.result_table(finished, None, sum(finished.report["timings_s"].values())))
    if (spent := finished.report["budget"]) is not None:
        yield _curve(spent)


def _comparison(comparison: Comparison) -> Iterator[str]:
    from mlxq.comparison import charts
    from mlxq.comparison.report import footnotes
    from mlxq.show import comparison_tables as tables
    from mlxq.writing.pictures import as_svg

    yield from map(table_html, tables.comparison_tables(comparison))
    yield from map(table_html, tables.answer_tables(comparison))
    for result in comparison.candidates:
        yield _text_line(verdict(result, comparison.reference) + ".")
    yield from map(_text_line, footnotes(comparison))
    if comparison.candidates:
        yield as_svg(charts.size_against_kl(comparison))


def _curve(spent: Mapping[str, Any]) -> str:
    from mlxq.writing.pictures import as_svg, size_kl_curve

    return as_svg(size_kl_curve(spent))


def table_html(table: Table) -> str:
    """A table of the terminal as a ``<table>``: its title, its headers where they are shown, and its cells."""
    columns = [(column, list(column.cells)) for column in table.columns]
    caption = ""
    if table.title:
        caption = f'<caption style="text-align:left;font-weight:bold">{_marked(table.title)}</caption>'
    head = ""
    if table.show_header:
        cells = (_cell("th", column.header, column.justify) for column, _ in columns)
        head = f"<thead><tr>{''.join(cells)}</tr></thead>"
    body = "".join(
        f"<tr{_dimmed(row.style)}>{''.join(_cell('td', cells[at], column.justify) for column, cells in columns)}</tr>"
        for at, row in enumerate(table.rows)
    )
    return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


def _cell(tag: str, content: Any, justify: str) -> str:
    # Said of every cell: notebooks would put all of them on the right.
    side = "right" if justify == "right" else "left"
    return f'<{tag} style="text-align:{side}">{_marked(content)}</{tag}>'


def _dimmed(style: object) -> str:
    return ' style="opacity:.6"' if style == "dim" else ""


def _line(markup: str) -> str:
    return f"<p>{_marked(markup)}</p>"


def _text_line(text: str) -> str:
    return f"<p>{escape(clean(text))}</p>"


def _marked(content: Any) -> str:
    """What a cell holds, its markup as HTML and everything else escaped."""
    text = content if isinstance(content, Text) else Text.from_markup(str(content))
    return "".join(
        _styled(escape(clean(segment.text)), segment.style)
        for segment in text.render(Console(width=10_000, color_system=None), end="")
        if segment.text
    )


def _styled(html: str, style: Style | None) -> str:
    if style is None:
        return html
    if style.color is not None:
        html = f'<span style="color:{escape(style.color.name)}">{html}</span>'
    if style.dim:
        html = f'<span style="opacity:.6">{html}</span>'
    return f"<b>{html}</b>" if style.bold else html
