"""Every way to choose numbers, in one list, and which of them a recipe's ``method`` comes to."""

from __future__ import annotations

from mlxq.methods.affine_fit import AFFINE_FIT
from mlxq.methods.formats import Format
from mlxq.methods.gptq import GPTQ
from mlxq.methods.method import Method, Needs
from mlxq.methods.mx_fit import MX_FIT
from mlxq.methods.rtn import RTN

# From the least to the most that is done for a weight: what cannot be done comes down to what stands before it.
METHODS: tuple[Method, ...] = (RTN, AFFINE_FIT, MX_FIT, GPTQ)
# In a recipe: whichever suits the module.
AUTO = "auto"
# What a recipe may ask for.
METHOD_NAMES: tuple[str, ...] = (*dict.fromkeys(method.name for method in METHODS), AUTO)


def choose(asked: str, fmt: Format, given: Needs) -> Method:
    """The method that ``asked`` comes to in ``fmt`` where calibration gives a module ``given``.

    It is the one that does most, and no more than was asked, of those that take the format and have what they need.
    ``auto`` asks for whatever pays.
    """
    able = [method for method in METHODS if method.takes(fmt) and method.needs in given]
    if asked == AUTO:
        return [method for method in able if method.pays(fmt)][-1]
    last = max(index for index, method in enumerate(METHODS) if method.name == asked)
    return [method for method in able if METHODS.index(method) <= last][-1]


def scored_by(asked: str, fmt: Format) -> Method:
    """The method whose encodings stand for those of ``asked`` where formats are scored.

    Error feedback ranks formats like the fit that it builds on, and on every option would cost ten times as much.
    """
    return choose(asked, fmt, Needs.SECOND_MOMENTS)


def named(name: str, fmt: Format) -> Method:
    """The method of that name that encodes ``fmt``, as a plan records it."""
    return next(method for method in METHODS if method.name == name and method.takes(fmt))


def uses_text(asked: str) -> bool:
    """Whether calibration text makes a difference to what a recipe asks for."""
    return asked == AUTO or any(method.uses for method in METHODS if method.name == asked)


def needs_text(asked: str) -> bool:
    """Whether what a recipe asks for is nothing without calibration text."""
    return asked != AUTO and all(method.needs for method in METHODS if method.name == asked)


def described() -> str:
    """Every choice and what it does: ``rtn rounds, fit refits each grid, ...``."""
    does = {method.name: method.does for method in METHODS}
    return ", ".join(f"{name} {what}" for name, what in {**does, AUTO: "picks"}.items())
