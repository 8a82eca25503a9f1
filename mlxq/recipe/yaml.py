"""YAML as recipes use it: plain data with the line of every value, and every fault of the file itself."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

LARGEST_FILE = 1_000_000  # bytes
MOST_VALUES = 250_000  # keys too
DEEPEST = 20
_MOST_ALIASES = 100
_MOST_EXPANDED = 100_000  # values that aliases add
_LONGEST_NUMBER = 40  # characters

# libyaml where PyYAML was built with it: ten times faster on recipes that list every module.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INDENTED_BY_TAB = re.compile(r"^ *\t[ \t]*[^\s#]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_YAML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_TAG = "tag:yaml.org,2002:"
_NUMBERS = frozenset((f"{_TAG}int", f"{_TAG}float"))


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
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return _unreadable("", None, "is a folder; a recipe is a YAML file")
        # Opening a pipe waits for whoever writes to it, and a device may never end.
        if not stat.S_ISREG(status.st_mode):
            return _unreadable("", None, "is a device or a pipe; a recipe is a YAML file")
        if status.st_size > LARGEST_FILE:
            return _unreadable("", None, f"is larger than {LARGEST_FILE // 1_000_000} MB; that is no recipe")
        with path.open("rb") as file:
            # No more than it said it holds: some files of the system never end, and say 0.
            text = file.read(status.st_size).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return _unreadable("", None, f"is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})")
    except (OSError, ValueError) as error:
        return _unreadable("", None, f"can't be read: {getattr(error, 'strerror', None) or error}")
    return parse_document(text)


def parse_document(text: str) -> Document:
    """Parse the text of a recipe, whose top level is a mapping."""
    for number, line in enumerate(text.split("\n"), start=1):
        if _INDENTED_BY_TAB.match(line):
            return _unreadable(text, number, "a tab indents this line; YAML indents with spaces")
    try:
        node = _compose(text)
        if node is None:
            return _unreadable(text, None, "is empty; a recipe is a mapping such as `default: {bits: 4}`")
        if node.kind != "mapping":
            return _unreadable(text, node.line, f"is a {node.kind}; a recipe is a mapping of keys to values")
        walk = _Walk()
        data = walk.value(node, ())
    except _Refusal as refusal:
        return _unreadable(text, refusal.line, refusal.message)
    return Document(text, data, walk.lines, tuple(walk.faults))


def parse_value(text: str) -> Any:
    """A value from the command line, read as YAML. Raises ValueError saying what is wrong with it."""
    try:
        node = _compose(text)
        if node is None:
            return None
        walk = _Walk()
        value = walk.value(node, ())
    except _Refusal as refusal:
        raise ValueError(refusal.message) from None
    if walk.faults:
        raise ValueError(walk.faults[0].message)
    return value


def text_fault(text: str) -> str | None:
    """Say which character of ``text`` has no place in a recipe, or None."""
    found = _CONTROL.search(text)
    return f"holds the control character U+{ord(found[0]):04X}" if found else None


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


class _Refusal(Exception):
    """Text that is no YAML, or YAML that is no recipe."""

    def __init__(self, line: int | None, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(slots=True)
class _Node:
    """A value as written: ``content`` is text, nodes, or pairs of nodes, as ``kind`` says."""

    kind: str
    """``single value``, ``list`` or ``mapping``."""
    line: int
    content: Any
    plain: bool = True
    """Not in quotes, so that it may be a number and the like."""
    seen: bool = False
    """Already walked: an alias leads here."""


def _compose(text: str) -> _Node | None:
    """The tree of the only document in ``text``; an alias is the node that it stands for.

    Built from the parser's events, so that limits hold before anything recurses or is expanded.
    """
    if found := _NOT_YAML.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise _Refusal(line, f"holds the control character U+{ord(found[0]):04X}")
    try:
        return _tree(text)
    except yaml.MarkedYAMLError as error:
        mark: Any = error.problem_mark or error.context_mark
        if mark is None:
            raise _Refusal(None, f"is not valid YAML: {error.problem}") from None
        raise _Refusal(mark.line + 1, _explain(error, text, mark)) from None


def _explain(error: yaml.MarkedYAMLError, text: str, mark: Any) -> str:
    # Parsers have limits of their own, which they may reach by reading ahead of what they have told us of.
    before = text[: mark.index]
    if sum(map(before.count, "[{")) - sum(map(before.count, "]}")) > DEEPEST:
        return f"values are nested more than {DEEPEST} deep"
    if "\t" in [*text.split("\n"), ""][mark.line]:
        return "a tab is in this line; YAML separates with spaces"
    return f"is not valid YAML: {error.problem or error.context}"


def _tree(text: str) -> _Node | None:
    """The document's node, None for an empty one. Raises yaml.MarkedYAMLError or _Refusal."""
    root: _Node | None = None
    open_nodes: list[tuple[_Node, str | None]] = []  # what is being filled, and its anchor
    anchors: dict[str, _Node] = {}
    aliases = nodes = 0
    for event in yaml.parse(text, Loader=_Loader):
        start: Any = event.start_mark
        line = start.line + 1
        if isinstance(event, yaml.DocumentStartEvent) and root is not None:
            raise _Refusal(line, "holds a second document; a recipe is one")
        if isinstance(event, yaml.CollectionEndEvent):
            node, anchor = open_nodes.pop()
        elif isinstance(event, yaml.NodeEvent):
            node, anchor = _node(event, line, anchors, open_nodes), event.anchor
        else:
            continue
        nodes += 1
        if nodes > MOST_VALUES:
            raise _Refusal(None, f"holds more than {MOST_VALUES} values; that is no recipe")
        aliases += isinstance(event, yaml.AliasEvent)
        if aliases > _MOST_ALIASES:
            raise _Refusal(line, f"there are more than {_MOST_ALIASES} aliases")
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((node, anchor))
            if len(open_nodes) > DEEPEST:
                raise _Refusal(line, f"values are nested more than {DEEPEST} deep")
            continue
        if anchor is not None:
            anchors[anchor] = node
        if open_nodes:
            open_nodes[-1][0].content.append(node)
        else:
            root = node
    # An empty document is one plain scalar without text.
    return None if root is not None and root.content == "" and root.plain else root


def _node(
    event: yaml.NodeEvent, line: int, anchors: Mapping[str, _Node], open_nodes: Sequence[tuple[_Node, str | None]]
) -> _Node:
    """The node that an event begins, or that an alias stands for."""
    if isinstance(event, yaml.AliasEvent):
        if any(event.anchor == anchor for _, anchor in open_nodes):
            raise _Refusal(line, "an alias is inside itself or nests too deep")
        if event.anchor not in anchors:
            raise _Refusal(line, f"no value is marked &{event.anchor}, as this alias asks for")
        return anchors[str(event.anchor)]
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise _Refusal(line, f"has the tag {tag.replace(_TAG, '!!')}; write the value without it")
    if isinstance(event, yaml.ScalarEvent):
        return _Node("single value", line, event.value, plain=event.implicit[0])
    return _Node("mapping" if isinstance(event, yaml.MappingStartEvent) else "list", line, [])


class _Walk:
    """Turns nodes into plain data, noting the line of every key and item and every fault on the way."""

    def __init__(self) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.faults: list[YamlFault] = []
        self._expanded = 0
        self._scalars: Any = yaml.SafeLoader("")

    def value(self, node: _Node, path: KeyPath) -> Any:
        self._expanded += node.seen
        node.seen = True
        if self._expanded > _MOST_EXPANDED:
            raise _Refusal(node.line, f"its aliases expand to more than {_MOST_EXPANDED} values")
        if len(path) > DEEPEST:
            raise _Refusal(node.line, "an alias is inside itself or nests too deep")
        self.lines.setdefault(path, node.line)
        if node.kind == "mapping":
            return {key: self.value(child, (*path, key)) for key, child in self._items(node, path)}
        if node.kind == "list":
            return [self.value(child, (*path, index)) for index, child in enumerate(node.content)]
        return self._scalar(node, path)

    def _items(self, node: _Node, path: KeyPath) -> Iterator[tuple[str, _Node]]:
        first_line: dict[str, int] = {}
        for key_node, child in zip(node.content[::2], node.content[1::2], strict=True):
            line, key = key_node.line, key_node.content
            if key_node.kind != "single value":
                self.faults.append(YamlFault(line, path, f"a {key_node.kind} can't be a key"))
            elif key == "<<" and key_node.plain:
                self.faults.append(YamlFault(line, path, "`<<` is not part of recipes; use `extends`"))
            elif fault := text_fault(key):
                self.faults.append(YamlFault(line, path, f"a key {fault}"))
            elif key in first_line:
                message = f"duplicate key; it is already on line {first_line[key]}"
                self.faults.append(YamlFault(line, (*path, key), message))
            else:
                first_line[key] = line
                self.lines[(*path, key)] = line
                yield key, child

    def _scalar(self, node: _Node, path: KeyPath) -> Any:
        text = node.content
        tag = self._scalars.resolve(yaml.ScalarNode, text, (node.plain, not node.plain))
        fault = text_fault(text)
        if tag in _NUMBERS and ":" not in text:  # 4:8 is a base-60 number to YAML 1.1; in a recipe it is a slice
            if len(text) > _LONGEST_NUMBER:
                raise _Refusal(node.line, f"has a number of {len(text):,} characters; no recipe needs one")
            try:
                return self._scalars.construct_object(yaml.ScalarNode(tag, text))
            except ValueError:
                raise _Refusal(node.line, f"has {text} where a number was begun") from None  # 0x_
        elif tag == f"{_TAG}timestamp" and ":" not in text:
            fault = f"{text} is a date to YAML; quote it to make it text"
        elif tag in (f"{_TAG}bool", f"{_TAG}null"):
            return self._scalars.construct_object(yaml.ScalarNode(tag, text))
        if fault:
            self.faults.append(YamlFault(node.line, path, fault))
        return text
