"""Texts for the world, without where on this machine anything lies: of a path only its last name is left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# An absolute path inside a text, or one from a home folder; what follows ``//`` of an address is none.
_PATH = re.compile(
    r"""(?:\bfile://|(?<![\w.\-/~:])|(?<=:)(?!//))  # where one may begin
    (?:~[\w.-]*)?/(?:[^\s/'"`,;:<>(){}\[\]]+/)*     # folders
    (?P<name>[^\s/'"`,;:<>(){}\[\]]+)/?             # the last name""",
    re.VERBOSE,
)
# What a model said, and what a card of somebody else says: neither speaks of this machine.
_NOT_OURS = ("generation", "card")


def without_places(value: Any, known: Iterable[str] = ()) -> Any:
    """``value`` (data as JSON has it), its paths cut to their last names; paths below ``.`` stay as they are.

    ``known`` are paths that it may hold and that a pattern would miss, since there are spaces in them.
    """
    if isinstance(value, Mapping):
        return {k: v if k in _NOT_OURS else without_places(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, known) for item in value]
    return _cut(value, known) if isinstance(value, str) else value


def _cut(text: str, known: Iterable[str]) -> str:
    for path in sorted(known, key=len, reverse=True):
        if _leads_away(path):
            text = text.replace(path, Path(path).name)
    for folder in _telling_folders():
        text = re.sub(rf"{re.escape(folder)}(?:/|(?![\w.-]))", lambda found: "" if found[0][-1] == "/" else ".", text)
    if "\n" not in text and _leads_away(text):
        # All of it is a path, spaces or not, or a path and what follows it.
        return text.rstrip("/").rpartition("/")[2]
    return _PATH.sub(lambda found: found["name"], text)


def _leads_away(path: str) -> bool:
    return path.startswith(("/", "~")) or ".." in Path(path).parts


def _telling_folders() -> list[str]:
    """Folders that tell whose machine this is, the longest first."""
    folders = {str(each) for folder in (Path.cwd(), Path.home()) for each in (folder, folder.resolve())}
    return sorted((folder for folder in folders if len(folder) > 1), key=len, reverse=True)


def place_in(text: str) -> str | None:
    """The home or working folder of this machine where ``text`` names it, else None."""
    return next((f for f in _telling_folders() if re.search(rf"{re.escape(f)}(?![\w.-])", text)), None)
