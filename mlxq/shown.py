"""What a notebook shows of a result, asked for by the result and drawn far above it.

A result lies low in the house, and the tables that show it on the top floor. So that imports still point one way, it
names the module that draws it in text, which is read only where a notebook asks; nothing else is found this way.
"""

from __future__ import annotations

from importlib import import_module


class Shown:
    """A result that shows itself in a notebook as the tables of the terminal, with its pictures."""

    def _repr_html_(self) -> str:
        drawn: str = import_module("mlxq.show.html").as_html(self)
        return drawn
