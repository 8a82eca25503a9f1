"""The pattern language: which modules a rule means, and which rule decides each module."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from mlxq.errors import BadInputError

if TYPE_CHECKING:
    from mlxq.recipe.load import Rule

_WILDCARDS = frozenset("*?[")
# Long enough for any real slice, short enough that no product of integers in it becomes large.
_LONGEST_SLICE = 64


@dataclass(frozen=True)
class Match:
    """What decided a module: a rule's index, None for the default; ``also`` are later rules that match."""

    path: str
    rule: int | None
    also: tuple[int, ...]


def layer_index(path: str) -> int | None:
    """The layer a module is in: the first component that is a number, or None outside the layers."""
    return next((int(part) for part in path.split(".") if part.isascii() and part.isdigit()), None)


def parse_layers(slices: Sequence[str], layer_count: int) -> frozenset[int]:
    """The layers that any of ``slices`` selects from ``range(layer_count)``.

    Each is a Python slice or one index. A bound may be arithmetic over ``n``, the number of layers, with
    ``+ - * //`` and parentheses: ``"n//8+2::3"``. As in Python, a negative bound counts from the end and a
    slice may reach past it; an index that is no layer selects nothing.

    Raises BadInputError where a slice can't be parsed or its arithmetic fails.
    """
    layers = range(layer_count)
    chosen: set[int] = set()
    for text in slices:
        bounds = [_bound(part, text, layer_count) for part in text.split(":")]
        if len(bounds) == 1:
            index = bounds[0]
            if index is None:
                raise _bad_slice(text, "it is empty")
            if -layer_count <= index < layer_count:
                chosen.add(layers[index])
            continue
        if len(bounds) > 3:
            raise _bad_slice(text, "it has more than three parts")
        if bounds[2:] == [0]:
            raise _bad_slice(text, "the step is zero")
        chosen.update(layers[slice(*bounds)])
    return frozenset(chosen)


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
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except (re.error, OverflowError, RecursionError) as error:
            return f"bad regular expression {pattern[3:]!r}: {error}"
        return "the regular expression is empty" if pattern == "re:" else None
    if not pattern.strip():
        return "the pattern is empty"
    if pattern != pattern.strip():
        return f"pattern {pattern!r} has blanks around it"
    if "[" in pattern and not re.search(r"\[[!\]]?[^\]]*\]", pattern):
        return f"pattern {pattern!r} has a '[' without its ']'"
    return None


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` means the module at ``path``.

    ``re:`` is a full-match regular expression; with ``*``, ``?`` or ``[]`` a glob over the whole path (``*``
    crosses dots); anything else is the path itself or a trailing run of its components.
    """
    return _matcher(pattern)(path)


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
    """
    faults: list[list[str]] = []
    taken: list[frozenset[str]] = []
    for rule in rules:
        found, lines = _modules_of(rule, paths, layer_count, tied_head)
        taken.append(found)
        faults.append([] if rule.optional else lines)
    all_matching = {path: [i for i, found in enumerate(taken) if path in found] for path in paths}
    result = tuple(Match(path, hits[0] if hits else None, tuple(hits[1:])) for path, hits in all_matching.items())
    deciding = {match.rule for match in result}
    for index, found in enumerate(taken):
        if found and index not in deciding and not rules[index].inherited:
            firsts = sorted({all_matching[path][0] for path in found})
            faults[index].append(_shadowed(rules[index], len(found), [rules[first] for first in firsts]))
    return result, tuple(line for lines in faults for line in lines)


def _modules_of(
    rule: Rule, paths: Sequence[str], layer_count: int, tied_head: str | None
) -> tuple[frozenset[str], list[str]]:
    """The modules a rule matches, whoever decides them, and its fault lines."""
    faults = []
    found: set[str] = set()
    for pattern in rule.patterns:
        means = _matcher(pattern)
        hits = {path for path in paths if means(path) or (pattern == "lm_head" and path == tied_head)}
        if not hits:
            faults.append(f"{rule.where}: {pattern!r} matches no module{_closest(pattern, paths)}")
        found |= hits
    if rule.layers is None:
        return frozenset(found), faults
    try:
        layers = parse_layers(rule.layers, layer_count)
    except BadInputError as error:
        return frozenset(), [*faults, f"{rule.where}: {error.message}"]
    inside = frozenset(path for path in found if layer_index(path) in layers)
    if found and not inside:
        what = "1 module" if len(found) == 1 else f"{len(found)} modules"
        faults.append(
            f"{rule.where}: matches {what}, none in layers {', '.join(rule.layers)}; "
            f"the model has {layer_count} layers, numbered from 0"
        )
    return inside, faults


def _shadowed(rule: Rule, count: int, earlier: Iterable[Rule]) -> str:
    by = ", ".join(f"{other.where} ({', '.join(other.patterns)})" for other in earlier)
    what = "the module it matches is" if count == 1 else f"all {count} modules it matches are"
    return f"{rule.where}: never decides anything; {what} taken by {by}, and the first match wins"


def _closest(pattern: str, paths: Sequence[str]) -> str:
    """``"; closest: a, b"``: names of modules that look most like what the pattern asks for."""
    wanted = pattern.removeprefix("re:").replace("\\", "")
    words = [word for word in re.split(r"[^A-Za-z0-9_.]+|\.(?=\W|$)", wanted) if word.strip("._")]
    wanted = max(words, key=len, default="").strip(".")
    width = wanted.count(".") + 1
    tails = {".".join(path.split(".")[-width:]): None for path in paths}
    near = difflib.get_close_matches(wanted, tails, n=3, cutoff=0.6)
    if not near:
        last = wanted.rpartition(".")[2]
        near = difflib.get_close_matches(last, {path.rpartition(".")[2]: None for path in paths}, n=3, cutoff=0.6)
    return f"; closest: {', '.join(near)}" if near else ""


@lru_cache(maxsize=4096)
def _matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith("re:"):
        full = re.compile(pattern[3:]).fullmatch
        return lambda path: full(path) is not None
    if _WILDCARDS & set(pattern):
        glob = re.compile(fnmatch.translate(pattern)).match
        return lambda path: glob(path) is not None
    tail = "." + pattern
    return lambda path: path == pattern or path.endswith(tail)


def _bad_slice(text: str, why: str) -> BadInputError:
    return BadInputError(f"bad layer slice {text!r}: {why}", 'write a Python slice such as ":4", "-4:" or "n//8+2::3"')


def _bound(part: str, text: str, n: int) -> int | None:
    """Value of one bound of a slice, None where it is left out."""
    if not part.strip():
        return None
    if len(text) > _LONGEST_SLICE:
        raise _bad_slice(text[:20] + "...", f"it is longer than {_LONGEST_SLICE} characters")
    try:
        return _value(ast.parse(part.strip(), mode="eval").body, n)
    except ZeroDivisionError:
        raise _bad_slice(text, f"it divides by zero where n is {n}") from None
    except (SyntaxError, ValueError):
        raise _bad_slice(text, f"{part.strip()!r} is not arithmetic over integers and n") from None


def _value(node: ast.expr, n: int) -> int:
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
    raise ValueError("not layer arithmetic")
