"""What the Hub holds, asked with patience, and its refusals in words.

Everything goes through ``huggingface_hub``, which alone reads the token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlxq import __version__
from mlxq.errors import BadInputError, MlxqError
from mlxq.recipe.target import Target
from mlxq.retry import Waiting, chain, is_offline, limited, patiently, response_of, said_by
from mlxq.sources.front_matter import as_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_T = TypeVar("_T")


@dataclass(frozen=True)
class HubFile:
    """A file on the Hub: SHA-256 where it is kept outside git, git's own hash else."""

    size_bytes: int
    sha256: str | None
    git_hash: str


@dataclass(frozen=True)
class Remote:
    """What the Hub holds: ``branch_exists`` of the target's branch, ``commit`` and files of it or of ``main``."""

    exists: bool = False
    private: bool | None = None
    branch_exists: bool = False
    commit: str | None = None
    files: Mapping[str, HubFile] = field(default_factory=dict)


def hub_api() -> HfApi:
    """The client, under mlxq's name."""
    from huggingface_hub import HfApi

    return HfApi(library_name="mlxq", library_version=__version__)


def check_login() -> None:
    """Raise BadInputError where ``huggingface_hub`` has no token to publish with."""
    from mlxq.machine.runtime import logged_in

    if not logged_in():
        raise BadInputError(
            "there is no Hub login here, and publishing needs one", "Run hf auth login, or set HF_TOKEN."
        )


def remote_state(api: HfApi, target: Target) -> Remote:
    """What the Hub holds of ``target``'s repository; the empty ``Remote`` where there is none that one can see."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(target.repo)
    except RepositoryNotFoundError:
        return Remote()
    branch_exists = True
    try:
        info = api.model_info(target.repo, revision=target.branch)
    except RevisionNotFoundError:
        # A new branch starts from main.
        branch_exists = False
    assert info.sha is not None
    return Remote(True, info.private, branch_exists, info.sha, files_of(api, target.repo, info.sha))


def files_of(api: HfApi, repo: str, revision: str) -> dict[str, HubFile]:
    """Every file of a revision, by its path in the repository."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: HubFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in api.list_repo_tree(repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }


def remote_text(api: HfApi, target: Target, remote: Remote, name: str) -> str | None:
    """The text of a file that ``remote`` holds, or None."""
    if name not in remote.files:
        return None
    with no_progress_bars():
        return as_text(Path(api.hf_hub_download(target.repo, name, revision=remote.commit)).read_bytes())


def git_hash(content: bytes) -> str:
    """Git's name for a blob: SHA-1 over its length and content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within the context ``huggingface_hub`` draws none: for files too small for a bar, and where nobody looks."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def asked_patiently(call: Callable[[], _T], target: Target) -> Generator[Waiting, None, _T]:
    """``patiently``; the answer to a pull request may be lost and not the request: a second try could open another."""
    return (yield from patiently(call, lambda exc: _explained(exc, target), once=target.create_pr))


def _explained(exc: Exception, target: Target) -> MlxqError:
    """What went wrong on the Hub, in one line, and what to do."""
    from huggingface_hub.errors import GatedRepoError

    again = "Run the same command again: what the Hub has is not sent again."
    if is_offline(exc):
        return BadInputError("HF_HUB_OFFLINE is set, and publishing needs the Hub", "Unset it.")
    response = response_of(exc)
    if response is None:
        *_, root = chain(exc)
        return MlxqError(f"the connection to the Hub broke while publishing {target.repo}: {said_by(root)}", again)
    status = response.status_code
    if any(isinstance(e, GatedRepoError) for e in chain(exc)):
        return BadInputError(
            f"{target.repo} is gated, and your login was not let in", "Open its page on the Hub and accept its terms."
        )
    if status == 401:
        return BadInputError(
            "the Hub does not accept your login", "Log in again with hf auth login, or renew HF_TOKEN."
        )
    if status == 403:
        return BadInputError(
            f"your login may not write to {target.repo}",
            "Use a token with write rights to it (https://huggingface.co/settings/tokens), or try --create-pr.",
        )
    if status == 404:
        return BadInputError(f"the Hub knows nothing by that name: {said_by(exc)}", "Check the spelling.")
    if status in (409, 412):
        return MlxqError(f"{target.repo} was changed by somebody else meanwhile", again)
    if status == 429:
        return MlxqError(limited(exc), again)
    if status >= 500:
        return MlxqError(f"the Hub has trouble of its own: it answered {status}", again)
    return BadInputError(f"the Hub refused ({status}): {said_by(exc)}")
