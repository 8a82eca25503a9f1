"""Front matter of model cards: YAML as the Hub reads it, and changed a key at a time.

What the Hub takes from it (licence, languages, tags) is text, so every scalar is read as the text that is written:
``no`` is Norwegian, and ``1.10`` is no number. YAML 1.1, which PyYAML reads, has the one false and the other 1.1. What
is written is quoted where either version would read something else than text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from mlxq.errors import BadInputError

FILE_NAME = "README.md"
LONGEST = 1_000_000  # bytes
_MOST_VALUES = 100_000  # after aliases are followed
_DEEPEST = 20
# libyaml where PyYAML was built with it: many times faster.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FENCED = re.compile(r"---[ \t]*\n(.*?\n|)---[ \t]*(?:\n|\Z)", re.DOTALL)
_NULL = ("", "~", "null", "Null", "NULL")
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("str", "seq", "map", "null", "bool", "int", "float", "timestamp", "merge", "value")
)
_MEND = "Mend it between the two --- lines, or remove the file to have a new one written."


@dataclass(frozen=True)
class FrontMatter:
    """``text`` between the fences, and its ``values``: text, None, lists and mappings of them.

    ``lines`` are the lines of each key with its value, from the first up to behind the last.
    """

    text: str
    values: Mapping[str, Any]
    lines: Mapping[str, tuple[int, int]]

    def with_value(self, key: str, value: str | list[str]) -> FrontMatter:
        """The same with ``key`` replaced, or added at the end; every other line stays as it was written.

        Raises BadInputError where the way it is written does not let a key be changed alone.
        """
        lines = self.text.splitlines(keepends=True)
        start, stop = self.lines.get(key, (len(lines), len(lines)))
        changed = "".join([*lines[:start], dump({key: value}), *lines[stop:]])
        wanted = {**self.values, key: value}
        try:
            found = parse(changed)
        except BadInputError:
            found = self
        if found.values != wanted:
            raise BadInputError(
                f"{FILE_NAME}: {key!r} cannot be changed in its front matter as that is written",
                f"Write one key to a line there, or set it yourself: {dump({key: value}, flow=True).strip()}",
            )
        return found


def as_text(content: bytes) -> str:
    """A card as text with plain line ends, whatever editor it went through."""
    return content.decode("utf-8", errors="replace").removeprefix("\ufeff").replace("\r\n", "\n")


def split(card: str) -> tuple[str, str]:
    """Front matter without its fences, and the rest of a card; empty front matter where there is none."""
    found = _FENCED.match(card)
    return (found[1], card[found.end() :]) if found else ("", "\n" + card)


def parse(text: str) -> FrontMatter:
    """Read what is between the fences. Raises BadInputError in one line where it is no plain YAML mapping."""
    if len(text) > LONGEST:
        raise BadInputError(f"{FILE_NAME}: the front matter is longer than {LONGEST // 1_000_000} MB", _MEND)
    try:
        node = _compose(text)
        if node is None:
            return FrontMatter(text, {}, {})
        if not isinstance(node, yaml.MappingNode):
            raise BadInputError(
                f"{FILE_NAME}: the front matter is no mapping of keys to values", "Write it as key: value."
            )
        values = _Values().mapping(node, 0)
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        # The opening fence is the first line.
        where = f"{FILE_NAME}:{mark.line + 2}" if mark else FILE_NAME
        said = " ".join(str(getattr(exc, "problem", None) or exc).split())
        raise BadInputError(f"{where}: the front matter is no YAML that can be read: {said}", _MEND) from exc
    return FrontMatter(text, values, _lines(node))


def dump(data: Mapping[str, Any], *, flow: bool = False) -> str:
    """Data as YAML, whose text is text in YAML 1.1 and 1.2."""
    return str(yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=flow))


def _compose(text: str) -> yaml.Node | None:
    """The node tree of the only document in ``text``; None where it is empty.

    Its depth is checked on the parser's events first: composing recurses, events do not.
    """
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if documents > 1:
            raise _refusal("there is a second document in it", event)
        if depth > _DEEPEST:
            raise _refusal(f"values are nested more than {_DEEPEST} deep", event)
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


class _Values:
    """Turns nodes into values, as many as a card can have."""

    def __init__(self) -> None:
        self._seen = 0

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refusal("a key is no text", key)
            if key.value in found:
                raise _refusal(f"{key.value!r} is there twice", key)
            found[key.value] = self.value(child, depth + 1)
        return found

    def value(self, node: yaml.Node, depth: int) -> Any:
        self._seen += 1
        if self._seen > _MOST_VALUES:
            raise _refusal(f"its aliases expand to more than {_MOST_VALUES:,} values", node)
        if depth > _DEEPEST:
            raise _refusal("an alias is inside itself or nests too deep", node)
        if node.tag not in _PLAIN_TAGS:
            raise _refusal(f"a value has the tag {str(node.tag)[:80]!r}", node)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, depth + 1) for child in node.value]
        assert isinstance(node, yaml.ScalarNode)
        # With libyaml a plain scalar has the style "", without it None.
        return None if not node.style and node.value in _NULL else str(node.value)


def _refusal(problem: str, at: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = at.start_mark
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _lines(root: yaml.MappingNode) -> dict[str, tuple[int, int]]:
    """The lines of each key of ``root`` with its value."""
    return {
        str(key.value): (key.start_mark.line, max(key.end_mark.line, _last_line(child, key)) + 1)
        for key, child in root.value
    }


def _last_line(node: yaml.Node, key: yaml.Node) -> int:
    """The last line of a value. A collection in blocks is marked to end where the next token begins."""
    if node.start_mark.index < key.start_mark.index:
        return int(key.end_mark.line)  # An alias: its node lies elsewhere.
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        leaf, before = last[::-1] if isinstance(node, yaml.MappingNode) else (last, key)
        return max(int(before.end_mark.line), _last_line(leaf, before))
    end = node.end_mark
    return int(end.line) - (end.column == 0 and end.line > node.start_mark.line)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would read as a number, as well as what YAML 1.1 would."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a list that is there twice out twice."""
        return True


for _kind, _form in (
    ("int", r"0o[0-7]+|0x[0-9a-fA-F]+|[-+]?[0-9]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"),
):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_form})$"), list("-+.0123456789"))
