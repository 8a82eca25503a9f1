"""YAML as recipes use it: plain data with the line of every value, and every fault of the file itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

LARGEST_FILE = 1_000_000  # bytes
_MOST_VALUES = 100_000  # after aliases are followed
_MOST_ALIASES = 100
_DEEPEST = 20

# libyaml where PyYAML was built with it: ten times faster on recipes that list every module.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INDENTED_BY_TAB = re.compile(r"^ *\t[ \t]*[^\s#]")
_MERGE_TAG = "tag:yaml.org,2002:merge"
_NUMERIC_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


@dataclass(frozen=True)
class YamlFault:
    """Something wrong with the file itself: ``line`` counts from 1, None where the whole file is meant."""

    line: int | None
    path: KeyPath
    message: str


@dataclass(frozen=True)
class Document:
    """A recipe file as read: ``data`` ({} where unreadable) and the line of every key and list item in it."""

    text: str
    data: dict[str, Any]
    lines: dict[KeyPath, int]
    faults: tuple[YamlFault, ...]


def read_document(path: Path) -> Document:
    """Read a YAML file. Never raises: what is wrong with the file is in ``faults``."""
    if path.is_dir():
        return _unreadable("", None, "is a folder; a recipe is a YAML file")
    try:
        if path.stat().st_size > LARGEST_FILE:
            return _unreadable("", None, f"is larger than {LARGEST_FILE // 1_000_000} MB; that is no recipe")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _unreadable("", None, f"is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})")
    except (OSError, ValueError) as error:
        return _unreadable("", None, f"can't be read: {getattr(error, 'strerror', None) or error}")
    return parse_document(text)


def parse_document(text: str) -> Document:
    """Parse the text of a recipe, whose top level is a mapping."""
    for number, line in enumerate(text.splitlines(), start=1):
        if _INDENTED_BY_TAB.match(line):
            return _unreadable(text, number, "a tab indents this line; YAML indents with spaces")
    try:
        node = compose(text)
        if node is None:
            return _unreadable(text, None, "is empty; a recipe is a mapping such as `default: {bits: 4}`")
        if not isinstance(node, yaml.MappingNode):
            return _unreadable(text, _line(node), f"is a {_shape(node)}; a recipe is a mapping of keys to values")
        walk = _Walk()
        data = walk.value(node, ())
    except yaml.MarkedYAMLError as error:
        return _unreadable(text, _error_line(error), _explain(error, text))
    except yaml.YAMLError as error:  # a control character has no mark
        return _unreadable(text, None, f"is not YAML: {' '.join(str(error).split())}")
    return Document(text, data, walk.lines, tuple(walk.faults))


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML. Raises ValueError saying what is wrong with it."""
    try:
        node = compose(text)
        if node is None:
            return None
        walk = _Walk()
        value = walk.value(node, ())
    except yaml.MarkedYAMLError as error:
        raise ValueError(_explain(error, text)) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    if walk.faults:
        raise ValueError(walk.faults[0].message)
    return value


def heading(text: str) -> str:
    """The comment at the top of a recipe: its first paragraph on one line, without editor directives."""
    words: list[str] = []
    for line in text.lstrip("\ufeff").splitlines():
        comment = line.strip()
        if comment.startswith("# yaml-language-server:") or (not words and comment in ("", "#", "---")):
            continue
        if not comment.startswith("#") or comment == "#":
            break
        words.append(comment.lstrip("# ").rstrip())
    return " ".join(words)


def _unreadable(text: str, line: int | None, message: str) -> Document:
    return Document(text, {}, {}, (YamlFault(line, (), message),))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shape(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "list"
    return "mapping" if isinstance(node, yaml.MappingNode) else "single value"


class _Refusal(yaml.MarkedYAMLError):
    """YAML that is valid and still no recipe."""

    def __init__(self, problem: str, at: yaml.Node | yaml.Event) -> None:
        mark: Any = at.start_mark
        super().__init__(problem=problem, problem_mark=mark)


def _error_line(error: yaml.MarkedYAMLError) -> int | None:
    mark = error.problem_mark or error.context_mark
    return None if mark is None else int(mark.line) + 1


def _explain(error: yaml.MarkedYAMLError, text: str) -> str:
    if isinstance(error, _Refusal):
        return str(error.problem)
    lines = text.splitlines()
    line = _error_line(error)
    if line is not None and line <= len(lines) and "\t" in lines[line - 1]:
        return "a tab is in this line; YAML separates with spaces"
    return f"is not valid YAML: {error.problem or error.context}"


def compose(text: str, kind: str = "a recipe") -> yaml.Node | None:
    """The node tree of the only document in ``text``, which is of this ``kind``; None where it is empty.

    Depth and aliases are checked on the event stream first: composing recurses, events don't.
    """
    depth = aliases = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refusal(f"holds a second document; {kind} is one", event)
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
        if depth > _DEEPEST:
            raise _Refusal(f"values are nested more than {_DEEPEST} deep", event)
        if aliases > _MOST_ALIASES:
            raise _Refusal(f"there are more than {_MOST_ALIASES} aliases", event)
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


class _Walk:
    """Turns nodes into plain data, noting the line of every key and item and every fault on the way."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[YamlFault] = []
        self._seen = 0
        self._scalars = yaml.SafeLoader("")

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._seen += 1
        if self._seen > _MOST_VALUES:
            raise _Refusal(f"its aliases expand to more than {_MOST_VALUES} values", node)
        if len(path) > _DEEPEST:
            raise _Refusal("an alias is inside itself or nests too deep", node)
        self.lines.setdefault(path, _line(node))
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(child, (*path, key)) for key, child in self._items(node, path)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*path, index)) for index, child in enumerate(node.value)]
        return self._scalar(node)

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node]]:
        first_line: dict[str, int] = {}
        for key_node, child in node.value:
            line = _line(key_node)
            if key_node.tag == _MERGE_TAG:
                self.faults.append(YamlFault(line, path, "`<<` is not part of recipes; use `extends`"))
                continue
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self.faults.append(YamlFault(line, path, f"a {_shape(key_node)} can't be a key"))
                continue
            if key in first_line:
                message = f"duplicate key; it is already on line {first_line[key]}"
                self.faults.append(YamlFault(line, (*path, key), message))
                continue
            first_line[key] = line
            self.lines[(*path, key)] = line
            yield key, child

    def _scalar(self, node: yaml.Node) -> Any:
        # YAML 1.1 reads an unquoted 4:8 as a base-60 number; in a recipe it is a slice.
        if node.tag in _NUMERIC_TAGS and ":" in node.value:
            return str(node.value)
        try:
            return self._scalars.construct_object(node)
        except ValueError as error:  # !!int x, 2020-13-45
            raise _Refusal(str(error), node) from None
