"""Every error a person can meet, and the exit code each one ends with."""

from __future__ import annotations


class MlxqError(Exception):
    """A run that failed for a reason we can explain: exit code 1.

    ``message`` says what is wrong and where (file, line, module path); ``hint`` says what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadInputError(MlxqError):
    """What the person asked for cannot be done as asked: exit code 2."""

    exit_code = 2


class RecipeError(BadInputError):
    """One or more faults in a recipe, all found at once.

    ``faults`` holds one finished line per fault, each with file, line and YAML path.
    """

    def __init__(self, faults: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__("\n".join(faults), hint)
        self.faults = faults


class ChildError(MlxqError):
    """What was tried in a process of its own raised, crashed, or passed a limit; the run itself is unharmed."""


class GateError(MlxqError):
    """A quality gate failed: exit code 3."""

    exit_code = 3
