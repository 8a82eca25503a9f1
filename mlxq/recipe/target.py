"""Where a model is published: a repository on the Hub, and how it gets there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# What the Hub takes as org/name.
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}\w)?(?<!\.git)")


@dataclass(frozen=True)
class Target:
    """Where a model goes. ``revision`` is a branch, made where need be; None is ``main``."""

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    collection: str | None = None
    message: str | None = None

    @property
    def branch(self) -> str:
        return self.revision or "main"


def target_faults(target: Target) -> Iterator[tuple[str, str]]:
    """What cannot be, as far as it shows without the Hub: the field, and what is wrong with it."""
    if not _REPO.fullmatch(target.repo):
        yield "repo", f"{target.repo!r} is no repository; write org/name, of letters, digits, '-', '_' and '.'"
    if target.create_pr and target.branch != "main":
        yield "create_pr", f"a pull request is always against main, so it cannot go to branch {target.revision!r}"
