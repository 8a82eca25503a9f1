"""Text from files made harmless: what a terminal would obey, or a reader be misled by, is taken out."""

from __future__ import annotations

import re

# C0 and C1 controls but tab and newline, bidirectional marks and overrides, separators that break lines, and halves of
# surrogate pairs, which no encoding takes: a name of a file that is not UTF-8 has them.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` without control characters, escape sequences and bidirectional marks; tabs and newlines stay."""
    return _OBEYED.sub("", text)


def clean_line(text: str) -> str:
    """``text`` cleaned, on one line."""
    return " ".join(clean(text).split())


def clean_json(text: str) -> str:
    """JSON text with the same characters as escapes: the data is unchanged, and nothing obeys it."""
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
