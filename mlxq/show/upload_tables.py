"""An upload as tables: what would be sent, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from mlxq.show.tables import plain_table, size_text

if TYPE_CHECKING:
    from mlxq.publish.outlook import Outlook
    from mlxq.recipe.target import Target


def upload_table(outlook: Outlook) -> Table:
    """The files as an upload would leave them on the Hub."""
    table = plain_table("file", "size", "on the Hub", right=("size",))
    for change in outlook.changes:
        style = "dim" if change.change == "unchanged" else ""
        table.add_row(escape(change.name), size_text(change.size_bytes), change.change, style=style)
    return table


def upload_summary(target: Target, outlook: Outlook) -> str:
    """One line: how much would be sent, and where it would go."""
    sent, removed = outlook.named("new", "changed"), outlook.named("removed")
    if not sent and not removed:
        return f"Nothing changed: {target.repo} holds all of it."
    where = f"{target.repo} (new)" if not outlook.remote.exists else target.repo
    if target.create_pr:
        where = f"a pull request on {where}"
    elif target.branch != "main":
        where += f", branch {target.branch}" + ("" if outlook.remote.branch_exists else " (new)")
    size = size_text(sum(change.size_bytes for change in sent))
    return f"{len(sent)} files, {size}, to {where}" + (f"; {len(removed)} removed." if removed else ".")
