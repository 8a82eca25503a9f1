"""Every error a person can meet, and the exit code each one ends with."""

from __future__ import annotations

from collections.abc import Sequence

MOST_FAULTS = 20  # that a person is shown at once


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

    ``faults`` holds one finished line per fault, each with file, line and YAML path: the first ``MOST_FAULTS``,
    and where there are more, a line that says how many.
    """

    def __init__(self, faults: Sequence[object], hint: str | None = None) -> None:
        # A line more is no shorter than the one fault that it would stand for.
        shown = faults if len(faults) <= MOST_FAULTS + 1 else faults[:MOST_FAULTS]
        more = len(faults) - len(shown)
        self.faults = tuple(map(str, shown)) + ((f"and {more:,} more faults",) if more else ())
        super().__init__("\n".join(self.faults), hint)


class ChildError(MlxqError):
    """What was tried in a process of its own raised, crashed, or passed a limit; the run itself is unharmed."""


class GateError(MlxqError):
    """A quality gate failed: exit code 3."""

    exit_code = 3
