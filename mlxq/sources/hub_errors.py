"""What the Hub would not do, in words."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from mlxq import __version__
from mlxq.errors import BadInputError, MlxqError
from mlxq.retry import chain, is_offline, limited, response_of, said_by
from mlxq.sources.remote import Reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_AGAIN = "The same command continues: files that are complete are not fetched again."


def explained(exc: Exception, reference: Reference) -> MlxqError:
    """What the Hub would not do, in one line, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from mlxq.machine.runtime import logged_in

    repo = reference.repo
    errors = list(chain(exc))
    if is_offline(exc):
        return not_cached(reference, "HF_HUB_OFFLINE forbids asking the Hub")
    if any(isinstance(e, GatedRepoError) for e in errors):
        steps = f"Open {constants.ENDPOINT}/{repo}, click 'Agree and access repository'"
        return BadInputError(
            f"{repo} is gated: its owner asks you to accept terms first",
            f"{steps}, then run the same command again." if logged_in() else f"{steps}, then run: hf auth login",
        )
    if any(isinstance(e, RevisionNotFoundError) for e in errors):
        return BadInputError(
            f"{repo} has no revision {reference.revision!r}", f"Name a branch, tag or commit of it.{_branches(repo)}"
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in errors):
        login = (
            "For a private one: your login may not be allowed to see it."
            if logged_in()
            else "For a private one, log in first: hf auth login"
        )
        near = _near(repo)
        return BadInputError(
            f"no model at {repo!r}: it is no folder here, and no repository on the Hub that you can see",
            f"Did you mean {near}? {login}" if near else f"Check the spelling. {login}",
        )
    if any(isinstance(e, EntryNotFoundError) for e in errors):
        return BadInputError(f"{repo} lacks a file it should have: {said_by(exc)}")
    response = response_of(exc)
    if response is not None and response.status_code == 401:
        return BadInputError("the Hub does not accept your login", "Run hf auth login again, or renew HF_TOKEN.")
    if response is not None and response.status_code == 403:
        return BadInputError(f"your login may not read {repo}: {said_by(exc)}", "Ask its owner, or use another token.")
    if response is not None and response.status_code == 429:
        return MlxqError(limited(exc), _AGAIN)
    if response is not None and response.status_code >= 500:
        return MlxqError(f"the Hub has trouble of its own: it answered {response.status_code} for {repo}", _AGAIN)
    if response is not None and response.status_code >= 400:
        return BadInputError(f"the Hub refused {repo} ({response.status_code}): {said_by(exc)}")
    return MlxqError(
        f"no folder {repo!r} here, and the connection to the Hub broke: {said_by(errors[-1]) or type(exc).__name__}",
        f"Check the connection. {_AGAIN} HF_HUB_OFFLINE=1 uses what is in the cache.",
    )


def not_cached(reference: Reference, what: str) -> BadInputError:
    return BadInputError(
        f"{reference.repo} cannot be opened offline: {what}",
        "HF_HUB_OFFLINE is set; unset it once to fetch the model, or name a folder.",
    )


def _near(repo: str) -> str | None:
    """The repository whose name is closest to ``repo``, among those of its owner and those of its name."""
    owner, _, name = repo.partition("/")
    found: set[str] = set()
    questions: tuple[dict[str, Any], ...] = (
        {"author": owner},
        {"search": name},
        {"search": re.split(r"[-_.]", name)[0]},
    )
    for question in questions:
        try:
            found |= {model.id for model in hub_api().list_models(limit=200, **question)}
        except Exception:  # A suggestion is not worth a second error.
            break
    by_lower = {each.lower(): each for each in sorted(found)}
    close = difflib.get_close_matches(repo.lower(), by_lower, 1, 0.75)
    return by_lower[close[0]] if close else None


def _branches(repo: str) -> str:
    try:
        refs = hub_api().list_repo_refs(repo)
    except Exception:  # A suggestion is not worth a second error.
        return ""
    return f" It has {', '.join([ref.name for ref in (*refs.branches, *refs.tags)][:8])}."


def hub_api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="mlxq", library_version=__version__)
