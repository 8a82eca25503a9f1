"""A recipe on its way to being one: plain data, where each value of it was written, and what is wrong with it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mlxq.errors import RecipeError
from mlxq.recipe.yaml import DEEPEST, MOST_VALUES, KeyPath, text_fault

# Faults are shown file by file: the recipe, what it extends, then what options say.
_AFTER_ALL_FILES = 1000
_LONGEST_SHOWN = 100  # characters of a key or of an option
_LONGEST_LINE = 1000
_LARGEST_NUMBER = 128  # bits


class Origin(NamedTuple):
    """Where a value was written: a file and line, or an option; ``at`` is the path to it there.

    ``rank`` orders faults; ``says_all``: the label alone names the value, as ``--size 2GB`` does. A tuple, because
    there is one for every value.
    """

    label: str
    line: int | None = None
    at: KeyPath = ()
    rank: int = 0
    says_all: bool = False

    @property
    def place(self) -> str:
        """``recipe.yaml:4``, or ``--set rules.0.bits=9``."""
        return self.label if self.line is None else f"{self.label}:{self.line}"

    @property
    def path(self) -> str:
        """``rules[1].match``."""
        parts = (f"[{part}]" if isinstance(part, int) else f".{shortened(part, _LONGEST_SHOWN)}" for part in self.at)
        return "".join(parts).removeprefix(".")


def option_origin(text: str, *, says_all: bool = False) -> Origin:
    """Of a value that an option gave, as it stands on the command line."""
    return Origin(shortened(text, _LONGEST_SHOWN), rank=_AFTER_ALL_FILES, says_all=says_all)


class Fault(NamedTuple):
    """One thing wrong. ``word`` is what was written where one of ``known`` was meant: the closest is suggested, or
    with ``lists`` all of them. Looked for only when shown: a file may hold a hundred thousand.
    """

    origin: Origin
    message: str
    word: str | None = None
    known: tuple[str, ...] = ()
    lists: bool = False

    def __str__(self) -> str:
        if not self.origin.label:
            return self.message
        path = f"{self.origin.path}: " if self.origin.path and not self.origin.says_all else ""
        hint = "" if self.word is None else suggestion(self.word, self.known)
        if self.lists and not hint:
            hint = f"; known are {', '.join(self.known)}"
        return shortened(f"{self.origin.place}: {path}{self.message}{hint}", _LONGEST_LINE)


@dataclass
class Draft:
    """Data, where each part of it came from, how many rules are the recipe's own, and the faults found so far."""

    data: dict[str, Any]
    origins: dict[KeyPath, Origin]
    own_rules: int
    faults: list[Fault] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Of the value at ``path``, or of the closest thing around it that was written."""
        while path not in self.origins and path:
            path = path[:-1]
        return self.origins[path]

    def add_fault(self, path: KeyPath, message: str, word: str | None = None, known: Iterable[str] = ()) -> None:
        """Something is wrong with the value at ``path``; ``word`` and ``known`` as a fault has them."""
        self.faults.append(Fault(self.origin(path), message, word, tuple(known)))

    def add_unknown_key(self, path: KeyPath, known: tuple[str, ...]) -> None:
        """Nobody reads the key at ``path``; ``known`` are those that may stand there."""
        self.faults.append(Fault(self.origin(path), "unknown key", str(path[-1]), known, lists=True))

    def put(self, keys: Sequence[str], value: Any, origin: Origin) -> None:
        """Put ``value``, which ``origin`` gave, at ``keys``. What can't be put is a fault and changes nothing."""
        data = copy.deepcopy(self.data)
        path, fault = _put(data, keys, value)
        if fault:
            self.faults.append(Fault(origin, fault))
            return
        self.data = data
        self.origins = {at: o for at, o in self.origins.items() if at[: len(path)] != path}
        for end in range(1, len(path) + 1):  # a mapping on the way may be new too
            self.origins.setdefault(path[:end], origin._replace(at=path[:end]))
        if path == ("rules",) and isinstance(value, list):
            self.own_rules = len(value)

    def over(self, parent: Draft) -> Draft:
        """This draft on top of the one it extends: its keys replace the parent's, its rules come first."""
        data = {**parent.data, **self.data}
        origins = {at: origin for at, origin in parent.origins.items() if at[:1] and at[0] not in self.data}
        origins |= self.origins
        own, inherited = self.data.get("rules"), parent.data.get("rules")
        if isinstance(own, list) and isinstance(inherited, list):
            data["rules"] = own + inherited
            for at, origin in parent.origins.items():
                if len(at) > 1 and at[0] == "rules" and isinstance(at[1], int):
                    origins[("rules", at[1] + len(own), *at[2:])] = origin
        return Draft(data, origins, self.own_rules, self.faults + parent.faults)

    def refusal(self) -> RecipeError:
        """The error that holds every fault, in the order of the files."""
        ordered = sorted(self.faults, key=lambda fault: (fault.origin.rank, fault.origin.line or 0))
        return RecipeError(tuple(dict.fromkeys(ordered)))


def draft_of(data: Mapping[str, Any], label: str) -> Draft:
    """A draft of data that came without lines, such as the recipe that ``mlxq.json`` records.

    Its rules count as inherited. Raises RecipeError where it nests too deep, is too large or holds control
    characters.
    """
    draft = Draft(dict(data), {(): Origin(label)}, own_rules=0)
    waiting: list[tuple[KeyPath, object]] = [((), draft.data)]
    seen = 0
    while waiting:
        path, value = waiting.pop()
        draft.origins[path] = Origin(label, at=path)
        children: list[tuple[KeyPath, object]] = []
        if isinstance(value, Mapping):
            children = [((*path, str(key)), child) for key, child in value.items()]
        elif isinstance(value, list):
            children = [((*path, index), child) for index, child in enumerate(value)]
        elif isinstance(value, str) and (fault := text_fault(value)):
            draft.add_fault(path, fault)
        elif isinstance(value, int) and value.bit_length() > _LARGEST_NUMBER:
            draft.faults = [Fault(draft.origins[path], "has more digits than a recipe needs")]
            raise draft.refusal()
        seen += len(children)
        if seen > MOST_VALUES:
            draft.faults = [Fault(Origin(label), f"holds more than {MOST_VALUES} values; that is no recipe")]
            raise draft.refusal()
        if children and len(path) >= DEEPEST:
            draft.faults = [Fault(Origin(label), f"values are nested more than {DEEPEST} deep")]
            raise draft.refusal()
        waiting += reversed(children)
    return draft


def shortened(text: str, width: int) -> str:
    """At most ``width`` characters of ``text``."""
    return text if len(text) <= width else text[: width - 3] + "..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'bits'?"``, or nothing where nothing known is close."""
    near = difflib.get_close_matches(word[:_LONGEST_SHOWN].lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def kind_of(value: object) -> str:
    """A value as a message names it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return shortened(repr(value) if isinstance(value, (str, int, float)) else str(value), 40)


def _put(data: dict[str, Any], keys: Sequence[str], value: Any) -> tuple[KeyPath, str | None]:
    """Put ``value`` at ``keys``: the path that was written (a mapping on the way may be new), or a fault."""
    here: Any = data
    path: KeyPath = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or len(key) > 9 or int(key) >= len(here):
                count = f"{len(here)} (0 to {len(here) - 1})" if here else "none"
                return path, f"{Origin('', at=path).path} has no item {key!r}; there are {count}"
            path = (*path, int(key))
            if last:
                here[int(key)] = value
            here = here[int(key)]
        elif isinstance(here, dict):
            path = (*path, key)
            if last:
                here[key] = value
            elif key not in here:
                if key == "rules":
                    return path, "there are no rules to set; write rules in the recipe"
                here[key] = {}
            here = here[key]
        else:
            return path, f"{Origin('', at=path).path} is {kind_of(here)}; it has no {key!r}"
    return path, None
