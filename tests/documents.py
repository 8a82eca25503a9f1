"""The code in README and docs/, taken out of it: blocks, the commands in them, and what is said to come of each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_EXAMPLE = re.compile(r"^Example: (?P<text>.*)$", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: ``where`` it is, its language, and the comment above it that says how it is run, or why not."""

    where: str
    language: str
    text: str
    mark: str | None

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command of a ``bash`` or ``console`` block, with the lines that a transcript shows after it."""
        text = self.text.replace("\\\n", " ")
        if self.language == "bash":
            return [(line, []) for line in text.splitlines() if line.strip()]
        found: list[tuple[str, list[str]]] = []
        for line in text.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.strip():
                found[-1][1].append(line)
        return found


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, and the examples of the generated reference."""
    text = document.read_text(encoding="utf-8")
    found = [(m.start("text"), m["language"], m["text"], m["mark"]) for m in _BLOCK.finditer(text)]
    found += [(m.start(), "bash", m["text"], None) for m in _EXAMPLE.finditer(text)]
    name = document.relative_to(ROOT)
    return [
        Block(f"{name}:{text.count(chr(10), 0, start) + 1}", language, content, mark)
        for start, language, content, mark in sorted(found)
    ]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return _BLOCK.sub("", document.read_text(encoding="utf-8"))


def inline_code(document: Path) -> list[str]:
    """What stands between single backquotes in a document's prose."""
    return _CODE.findall(prose(document))


# -- a transcript held to what really came


def missing_lines(shown: list[str], output: str) -> list[str]:
    """The lines of a transcript that do not come, in this order, in ``output``.

    Numbers may differ, and so may what stands behind the label of a row; ``...`` stands for anything. Lines that were
    wrapped for the page may be whole in the output.
    """
    actual, position, missing = _shape(output), 0, []
    for number, line in enumerate(shown):
        pattern = _pattern(line, heading=shown[number + 1 : number + 2] != [] and set(shown[number + 1]) <= set("─ "))
        if pattern is None:
            continue
        if match := re.compile(pattern, re.MULTILINE).search(actual, position):
            position = match.end()
        else:
            missing.append(line)
    return missing


def _pattern(line: str, *, heading: bool) -> str | None:
    """A regular expression for the shape of a line; None for what a table is drawn with, and for its cells' rest."""
    bare = line.strip()
    if bare == "..." or set(bare) <= set("─ ") or line.startswith(" " * 8):
        return None
    cells = re.split(r"\s{2,}", _shape(bare).removesuffix("..."))
    if heading:
        return r"\s+".join(map(_words, cells))
    return rf"^\s*{_words(cells[0])}(?=\s{{2}})" if len(cells) > 1 else _words(cells[0])


def _words(text: str) -> str:
    return r"\s+".join(re.escape(word) for word in text.split())


def _shape(text: str) -> str:
    """``text`` with each number, its unit and the plural after it made the same."""
    text = re.sub(r"\d[\d.,]*(?<=\d)(?: ?(?:B|[kMGT]B|s|min)\b)?", "#", text)
    return re.sub(r"(?<=\w)s\b", "", text)
