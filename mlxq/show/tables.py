"""What every table is made of, and the short ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from mlxq.machine.blas import BlasInfo
    from mlxq.machine.runtime import Environment
    from mlxq.recipe.model import Recipe


def size_text(nbytes: float) -> str:
    """Bytes in the decimal units disks and the Hub use: ``2.21 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}" if unit == "GB" else f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes:,.0f} B"


def shape_text(shape: Sequence[int]) -> str:
    """``(3072, 8192)`` as ``3072x8192``."""
    return "x".join(map(str, shape)) or "scalar"


def count_text(count: float) -> str:
    """A parameter count as people say it: ``134.5M``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f}{unit}" if unit == "B" else f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


def plain_table(*headers: str, title: str | None = None, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def facts_table(title: str | None = None) -> Table:
    """A table of one fact a row: its name, then what it is."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title=title, title_justify="left")
    table.title_style = "bold"
    return table


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """The shipped recipes and when to use each."""
    table = plain_table("name", "what it does")
    for recipe in recipes:
        table.add_row(f"[bold]{recipe.name}[/]", escape(recipe.description))
    return table


def environment_table(found: Environment) -> Table:
    """What this machine is."""
    from mlxq.machine.blas import BlasInfo

    table = facts_table()
    for field in fields(found):
        value = getattr(found, field.name)
        name = field.name.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, dict):
            for key, version in value.items():
                table.add_row(key, escape(str(version)))
        elif field.name.endswith("_bytes"):
            table.add_row(name, size_text(value) if value is not None else "unknown")
        elif isinstance(value, BlasInfo):
            for row in _blas_rows(value):
                table.add_row(*map(escape, row))
        elif isinstance(value, bool):
            table.add_row(name, "yes" if value else "no")
        else:
            table.add_row(name, escape(str(value)))
    return table


def _blas_rows(blas: BlasInfo) -> Iterator[tuple[str, str]]:
    yield "blas", f"{blas.name}: {blas.note}"
    if blas.path:
        yield "blas library", blas.path
    if blas.kernel:
        yield "blas kernel", blas.kernel
    if blas.gflops is not None:
        yield "blas product", f"{blas.gflops:,.{0 if blas.gflops >= 10 else 1}f} GFLOP/s (fp32)"
    for passed in blas.passed_over:
        yield "blas passed over", f"{passed.library}: {passed.why}"
