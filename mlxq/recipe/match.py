"""The pattern language: which modules a rule means, and which rule decides each module."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import itertools
import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlxq.errors import MOST_FAULTS, BadInputError
from mlxq.recipe.model import Rule

_WILDCARDS = frozenset("*?[")
# Long enough for any real slice, short enough that no product of integers in it becomes large.
_LONGEST_SLICE = 64
_ARITHMETIC = re.compile(r"[0-9n+\-*/() ]*")
_LONGEST_LAYER_NUMBER = 9  # digits

_LONGEST_PATTERN = 1000  # characters; regular expressions have limits of their own
_LONGEST_NAME = 200  # characters of a name that is worth looking for close ones
_LONGEST_SHOWN = 60  # characters of a pattern or slice in a message

# Of regular expressions: compiling takes time and memory in proportion to the characters, each as often as the
# repeats ask for it.
_LONGEST_EXPRESSION = 100_000
_LARGEST_EXPRESSION = 1_000_000
_DEEPEST_GROUPS = 50
_REPEAT = re.compile(r"\{(\d*),?(\d*)\}")
_NO_REPEAT = re.compile(r"(?<!\\)\{(?!(\d+(,\d*)?|,\d+)\})")
# CPU time for all modules together: a third of a second, and more where there is much to match. Matching a real pattern
# with a path takes about 3 microseconds.
_PATIENCE_S = 0.3
_PATIENCE_PER_MATCH_S = 20e-6


@dataclass(frozen=True)
class Match:
    """What decided a module: a rule's index, None for the default; ``also`` are later rules that match."""

    path: str
    rule: int | None
    also: tuple[int, ...]


def layer_index(path: str) -> int | None:
    """The layer a module is in: the first component that is a number, or None outside the layers."""
    return next((int(part) for part in path.split(".") if _is_layer_number(part)), None)


def parse_layers(slices: Sequence[str], layer_count: int) -> frozenset[int]:
    """The layers that any of ``slices`` selects from ``range(layer_count)``.

    Each is a Python slice or one index. A bound may be arithmetic over ``n``, the number of layers, with
    ``+ - * //`` and parentheses: ``"n//8+2::3"``. As in Python, a negative bound counts from the end and a
    slice may reach past it; an index that is no layer selects nothing.

    Raises BadInputError where a slice can't be parsed or its arithmetic fails.
    """
    return frozenset(layer for text in slices for layer in _selected(text, layer_count))


def _selected(text: str, layer_count: int) -> range:
    """The layers of one slice, as a range: however many a config claims, none is listed."""
    if len(text) > _LONGEST_SLICE:
        raise _bad_slice(text[:20] + "...", f"it is longer than {_LONGEST_SLICE} characters")
    layers = range(layer_count)
    bounds = [_bound(part, text, layer_count) for part in text.split(":")]
    if len(bounds) == 1:
        index = bounds[0]
        if index is None:
            raise _bad_slice(text, "it is empty")
        return layers[index : index + 1 or None]
    if len(bounds) > 3:
        raise _bad_slice(text, "it has more than three parts")
    if bounds[2:] == [0]:
        raise _bad_slice(text, "the step is zero")
    return layers[slice(*bounds)]


def slice_fault(text: str) -> str | None:
    """Say what is wrong with a layer slice whatever the model, or None."""
    try:
        # No real model has this many layers; it is here so that a divisor such as n-8 isn't zero by chance.
        parse_layers([text], 1009)
    except BadInputError as error:
        return error.message
    return None


def pattern_fault(pattern: str) -> str | None:
    """Say what is wrong with a pattern whatever the model, or None."""
    shown = _shown(pattern)
    if pattern == "re:":
        return "the regular expression is empty"
    if pattern.startswith("re:"):
        fault = _expression_fault(pattern[3:])
        return f"bad regular expression {shown[3:]!r}: {fault}" if fault else None
    if not pattern.strip():
        return "the pattern is empty"
    if pattern != pattern.strip():
        return f"pattern {shown!r} has blanks around it"
    if len(pattern) > _LONGEST_PATTERN:
        return f"pattern {shown!r} is longer than {_LONGEST_PATTERN:,} characters"
    if "[" in pattern and "]" not in pattern[pattern.index("[") :]:
        return f"pattern {shown!r} has a '[' without its ']'"
    return None


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` means the module at ``path``.

    ``re:`` is a full-match regular expression; with ``*``, ``?`` or ``[]`` a glob over the whole path (``*``
    crosses dots); anything else is the path itself or a trailing run of its components. Raises BadInputError
    for a regular expression that is none, or that takes too long.
    """
    return bool(matching(pattern, (path,), "pattern"))


def matching(pattern: str, paths: Sequence[str], where: str) -> frozenset[str]:
    """Those of ``paths`` that ``pattern`` means, see ``matches``; ``where`` it was written begins messages."""
    if pattern.startswith("re:"):
        check_pattern(pattern, where)
    return _Modules(paths).matching(pattern, where)


def check_pattern(pattern: str, where: str) -> None:
    """Raise BadInputError for a pattern that is none, whatever the model; ``where`` begins the message."""
    if fault := pattern_fault(pattern):
        raise BadInputError(f"{where}: {fault}", "docs/recipes.md has the patterns.")


def names_module(pattern: str) -> bool:
    """Whether a pattern names a module rather than sweeps over many.

    True for literal patterns and for globs whose last component is literal (``*.mlp.gate``).
    """
    if pattern.startswith("re:"):
        return False
    return not _WILDCARDS & set(pattern.rpartition(".")[2])


def assign(
    rules: Sequence[Rule], paths: Sequence[str], layer_count: int, tied_head: str | None
) -> tuple[tuple[Match, ...], tuple[str, ...]]:
    """Which rule decides each of ``paths``, and one line for each fault of the rules against this model.

    The first rule that matches decides. Faults: a pattern that matches nothing, with the closest module
    names; a rule whose layers hold none of what it matches; a rule that decides nothing because earlier ones
    take all it matches. ``optional`` silences the first two, ``inherited`` (a child overrides it) the last.

    ``tied_head`` is the path of the embedding where the model has no ``lm_head`` of its own: the literal
    pattern ``lm_head``, and no glob or regular expression, then means that path.

    Raises BadInputError where a regular expression takes too long.
    """
    modules = _Modules(paths, expressions=sum(p.startswith("re:") for rule in rules for p in rule.patterns))
    faults: list[str] = []
    hits: dict[str, list[int]] = {path: [] for path in paths}
    for index, rule in enumerate(rules):
        # Looking for close names takes time, and only so many faults are shown.
        found, lines = _modules_of(rule, modules, layer_count, tied_head, suggest=len(faults) < MOST_FAULTS)
        if not rule.optional:
            faults += lines
        firsts = sorted({hits[path][0] for path in found if hits[path]})
        if found and all(hits[path] for path in found) and not rule.inherited:
            faults.append(_shadowed(rule, len(found), [rules[first] for first in firsts]))
        for path in found:
            hits[path].append(index)
    result = tuple(Match(path, by[0] if by else None, tuple(by[1:])) for path, by in hits.items())
    return result, tuple(faults)


def _modules_of(
    rule: Rule, modules: _Modules, layer_count: int, tied_head: str | None, *, suggest: bool
) -> tuple[frozenset[str], list[str]]:
    """The modules a rule matches, whoever decides them, and its fault lines."""
    faults = []
    found: frozenset[str] = frozenset()
    for pattern in rule.patterns:
        hits = modules.matching(pattern, rule.where)
        if pattern == "lm_head" and tied_head is not None and tied_head in modules.paths:
            hits |= {tied_head}
        if not hits:
            near = _closest(pattern, modules.paths) if suggest else ""
            faults.append(f"{rule.where}: {_shown(pattern)!r} matches no module{near}")
        found |= hits
    if rule.layers is None:
        return found, faults
    try:
        layers = [_selected(text, layer_count) for text in rule.layers]
    except BadInputError as error:
        return frozenset(), [*faults, f"{rule.where}: {error.message}"]
    inside = frozenset(path for path in found if _is_in(layer_index(path), layers))
    if found and not inside:
        what = "1 module" if len(found) == 1 else f"{len(found)} modules"
        faults.append(
            f"{rule.where}: matches {what}, none in layers {', '.join(rule.layers)}; "
            f"the model has {layer_count} layers, numbered from 0"
        )
    return inside, faults


def _is_in(layer: int | None, selected: Sequence[range]) -> bool:
    return layer is not None and any(layer in each for each in selected)


def _shadowed(rule: Rule, count: int, earlier: Iterable[Rule]) -> str:
    by = ", ".join(f"{other.where} ({', '.join(other.patterns)})" for other in earlier)
    what = "the module it matches is" if count == 1 else f"all {count} modules it matches are"
    return f"{rule.where}: never decides anything; {what} taken by {by}, and the first match wins"


def _closest(pattern: str, paths: Sequence[str]) -> str:
    """``"; closest: a, b"``: names of modules that look most like what the pattern asks for."""
    if len(pattern) > _LONGEST_NAME:
        return ""
    wanted = pattern.removeprefix("re:").replace("\\", "")
    words = [word for word in re.split(r"[^A-Za-z0-9_.]+|\.(?=\W|$)", wanted) if word.strip("._")]
    wanted = max(words, key=len, default="").strip(".")
    width = wanted.count(".") + 1
    tails = {".".join(path.split(".")[-width:]): None for path in paths}
    near = difflib.get_close_matches(wanted, tails)
    if not near:
        last = wanted.rpartition(".")[2]
        near = difflib.get_close_matches(last, {path.rpartition(".")[2]: None for path in paths})
    return f"; closest: {', '.join(near)}" if near else ""


class _Modules:
    """The module paths that patterns are held against, and the time that regular expressions may still take."""

    def __init__(self, paths: Sequence[str], expressions: int = 1) -> None:
        self.paths = paths
        self._patience_s = _PATIENCE_S + _PATIENCE_PER_MATCH_S * expressions * len(paths)
        self._by_last: dict[str, list[str]] = {}
        for path in paths:
            self._by_last.setdefault(path.rpartition(".")[2], []).append(path)

    def matching(self, pattern: str, where: str) -> frozenset[str]:
        """The paths that ``pattern``, which has no fault, means. Raises BadInputError where that takes too long."""
        if pattern.startswith("re:"):
            return self._matching_expression(pattern, where)
        if _WILDCARDS & set(pattern):
            glob = _glob(pattern)
            return frozenset(path for path in self.paths if glob(path))
        ending = f".{pattern}"
        alike = self._by_last.get(pattern.rpartition(".")[2], ())
        return frozenset(path for path in alike if path == pattern or path.endswith(ending))

    def _matching_expression(self, pattern: str, where: str) -> frozenset[str]:
        full = _expression(pattern[3:]).fullmatch
        ends = time.process_time() + self._patience_s
        found = set()
        try:
            for path in self.paths:
                # regex counts CPU time too.
                if full(path, timeout=max(ends - time.process_time(), 1e-6)):
                    found.add(path)
        except TimeoutError:
            raise BadInputError(
                f"{where}: the regular expression {_shown(pattern)[3:]!r} takes too long to match a module's path",
                "Repeats inside repeats, such as (a+)+, do that; write it without.",
            ) from None
        self._patience_s = ends - time.process_time()
        return frozenset(found)


def _expression_fault(expression: str) -> str | None:
    """What our limits and Python's ``re`` have against a regular expression, or None."""
    import regex

    if fault := _size_fault(expression):
        return fault
    if _NO_REPEAT.search(expression):
        return "a '{' that begins no repeat; put a backslash before it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # a set within a set, which regex reads otherwise
            re.compile(expression)
        _expression(expression)
    except FutureWarning as warning:
        return f"{warning}; put a backslash before it"
    except (re.error, regex.error) as error:
        return str(error)
    return None


def _size_fault(expression: str) -> str | None:
    """Whether compiling a regular expression would take more than a moment, or recurse too deep."""
    counts = (max(int(n[:9] or 0) for n in found) for found in _REPEAT.findall(expression))
    size = math.prod((count for count in counts if count), start=len(expression))
    if len(expression) > _LONGEST_EXPRESSION or size > _LARGEST_EXPRESSION:
        return "it is too large, its repeats multiplied"
    depths = itertools.accumulate((char == "(") - (char == ")") for char in expression)
    if max(depths) > _DEEPEST_GROUPS:
        return f"its groups are nested more than {_DEEPEST_GROUPS} deep"
    return None


@lru_cache(maxsize=4096)
def _expression(expression: str) -> Any:
    """Compiled by ``regex``, which reads what ``re`` reads and can be given a time to be done in."""
    import regex

    return regex.compile(expression, regex.VERSION0)


@lru_cache(maxsize=4096)
def _glob(pattern: str) -> Callable[[str], object]:
    # What fnmatch makes of a glob never backtracks over more than one star.
    return re.compile(fnmatch.translate(pattern)).match


def _is_layer_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) <= _LONGEST_LAYER_NUMBER


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."


def _bad_slice(text: str, why: str) -> BadInputError:
    return BadInputError(f"bad layer slice {text!r}: {why}", 'write a Python slice such as ":4", "-4:" or "n//8+2::3"')


def _bound(part: str, text: str, n: int) -> int | None:
    """Value of one bound of a slice, None where it is left out."""
    if not part.strip():
        return None
    try:
        if not _ARITHMETIC.fullmatch(part.strip()):
            raise ValueError
        return _value(ast.parse(part.strip(), mode="eval").body, n)
    except ZeroDivisionError:
        raise _bad_slice(text, f"it divides by zero where n is {n}") from None
    except (SyntaxError, ValueError):
        raise _bad_slice(text, f"{part.strip()!r} is not arithmetic over integers and n") from None


def _value(node: ast.expr, n: int) -> int:
    """Of arithmetic over integers and ``n``. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            return value
        case ast.Name(id="n"):
            return n
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, n)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _value(left, n) + _value(right, n)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _value(left, n) - _value(right, n)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _value(left, n) * _value(right, n)
        case ast.BinOp(left=left, op=ast.FloorDiv(), right=right):
            return _value(left, n) // _value(right, n)
    raise ValueError
