"""Folding rows that repeat over layers: ``model.layers.{0-27}.mlp.down_proj``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Attributes = TypeVar("Attributes", bound=Hashable)


@dataclass(frozen=True)
class Folded(Generic[Attributes]):
    """Rows that differ in the layer number alone.

    ``path`` has the layers as ranges, ``members`` the paths as they were, ``count`` how many there are.
    """

    path: str
    attributes: Attributes
    count: int
    members: tuple[str, ...]


def fold(rows: Sequence[tuple[str, Attributes]]) -> tuple[Folded[Attributes], ...]:
    """Fold ``(path, attributes)`` rows over the layer number, in order of first appearance.

    The layer number is the first component of a path that is a number. Rows fold where all else in the path
    and the attributes are equal.
    """
    groups: dict[tuple[str, str | None, Attributes], list[tuple[str, int]]] = {}
    for path, attributes in rows:
        head, layer, tail = _split(path)
        groups.setdefault((head, tail, attributes), []).append((path, layer))
    return tuple(
        Folded(_folded_path(head, tail, members), attributes, len(members), tuple(path for path, _ in members))
        for (head, tail, attributes), members in groups.items()
    )


def _split(path: str) -> tuple[str, int, str | None]:
    """``model.layers``, 3, ``mlp.gate``; without a layer number the whole path, -1, None."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        # A number with leading zeros would not come back as it was.
        if part.isascii() and part.isdigit() and str(int(part)) == part:
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return path, -1, None


def _folded_path(head: str, tail: str | None, members: list[tuple[str, int]]) -> str:
    if len(members) == 1 or tail is None:
        return members[0][0]
    layers = "{" + ranges([layer for _, layer in members]) + "}"
    return ".".join(part for part in (head, layers, tail) if part)


def ranges(numbers: Sequence[int]) -> str:
    """``0-3,7,9-11`` for any order of those numbers."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
