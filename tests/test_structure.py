"""Measures of the code that keep it small enough to read: lines of modules and functions, and parameters.

A function's lines are all of it, signature and docstring too. Commands of the command line are counted without their
signatures, which are the tables of their options; they and the same commands as functions of Python (``mlxq.quantize``
and the others) have as many parameters as people have choices.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxq
from tests.documents import ROOT

LINES_OF_A_MODULE, LINES_OF_A_FUNCTION, PARAMETERS = 400, 60, 6
MODULES = sorted((ROOT / "mlxq").rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_command(module: Path, function: Function) -> bool:
    return module.parent.name == "cli" and function.name == "command"


def lines_of(module: Path, function: Function) -> int:
    last = function.end_lineno or 0
    return last - (function.body[0].lineno if is_command(module, function) else function.lineno) + 1


def parameters_of(function: Function) -> int:
    """How many there are beside ``self`` or ``cls``."""
    told = function.args
    named = [*told.posonlyargs, *told.args, *told.kwonlyargs, *filter(None, (told.vararg, told.kwarg))]
    return len(named) - (bool(named) and named[0].arg in ("self", "cls"))


def too_large(module: Path, text: str) -> Iterator[str]:
    """What of a module is over a measure, a line each."""
    if (count := len(text.splitlines())) > LINES_OF_A_MODULE:
        yield f"{count} lines"
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, Function):
            if (count := lines_of(module, function)) > LINES_OF_A_FUNCTION:
                yield f"{function.name} has {count} lines"
            many = (count := parameters_of(function)) > PARAMETERS
            is_verb = module.name == "verbs.py" and function.name in mlxq.__all__
            if many and not is_command(module, function) and not is_verb:
                yield f"{function.name} has {count} parameters"


def test_nothing_is_larger_than_a_reader_can_hold() -> None:
    found = {
        f"{module.relative_to(ROOT / 'mlxq').as_posix()}: {fault}"
        for module in MODULES
        for fault in too_large(module, module.read_text(encoding="utf-8"))
    }
    assert found == set()


@pytest.mark.parametrize(
    ("path", "text", "faults"),
    [
        ("a.py", "x = 1\n" * 400, []),
        ("a.py", "x = 1\n" * 401, ["401 lines"]),
        ("a.py", "def f():\n" + "    x = 1\n" * 59, []),
        ("a.py", "def f():\n" + "    x = 1\n" * 60, ["f has 61 lines"]),
        ("a.py", "class A:\n    def f(self, a, b, *, c, d, e, **f): ...", []),
        ("a.py", "def f(a, b, /, c, *d, e, f, **g): ...", ["f has 7 parameters"]),
        ("cli/a.py", "def command(a, b, c,\n" + "\n" * 60 + "d, e, f, g):\n" + "    x = 1\n" * 60, []),
        ("cli/a.py", "def command(a):\n" + "    x = 1\n" * 61, ["command has 61 lines"]),
        ("verbs.py", "def quantize(a, b, c, d, e, f, g): ...", []),
        ("api.py", "def written(a, b, c, d, e, f, g): ...", ["written has 7 parameters"]),
    ],
)
def test_what_is_too_large_is_seen(path: str, text: str, faults: list[str]) -> None:
    assert list(too_large(Path(path), text)) == faults
