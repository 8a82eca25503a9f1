"""Publishing a model on the Hub: proved here first, compared with what is there, sent, and checked there.

Everything goes through ``huggingface_hub``, which alone reads the token.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxq import __version__
from mlxq.architecture.opening import open_lazily
from mlxq.errors import BadInputError, MlxqError
from mlxq.publish import card
from mlxq.recipe.target import Target, target_faults
from mlxq.retry import TRIES, Waiting, chain, is_offline, patiently, response_of, said_by
from mlxq.writing.report import FILE_NAME, hash_files, read_report, report_bytes

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PLOT = "mlxq-comparison.png"
# Written anew at each upload, so what their hashes were says nothing.
_DRAWN = (card.FILE_NAME, PLOT)
# What mlx-lm would load beside the new weights, were it left from an earlier upload.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checked:
    """A finished model: what its ``mlxq.json`` says, and the size and SHA-256 of each file to publish.

    ``plot`` draws what was measured (PNG), where something was. ``problems`` are those that ``force`` let pass;
    ``left_out`` are files that mlxq did not write.
    """

    folder: Path
    report: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    plot: bytes | None
    problems: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class RemoteFile:
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
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


@dataclass(frozen=True)
class FileChange:
    """A file as publishing would leave it; ``change`` is new, changed, unchanged or removed."""

    name: str
    size_bytes: int
    change: str


@dataclass(frozen=True)
class Outlook:
    """What publishing would do. ``drawn`` holds the files written for it: the card, its plot, ``mlxq.json``."""

    remote: Remote
    changes: tuple[FileChange, ...]
    drawn: Mapping[str, bytes]

    @property
    def card(self) -> str:
        return self.drawn[card.FILE_NAME].decode()

    def named(self, *changes: str) -> tuple[FileChange, ...]:
        """The files with one of these changes."""
        return tuple(each for each in self.changes if each.change in changes)


@dataclass(frozen=True)
class Step:
    """What is being done, in words."""

    what: str


@dataclass(frozen=True)
class Published:
    """It is there, and its hashes are right. ``sent`` is empty where nothing had changed."""

    url: str
    commit: str
    pull_request: str | None
    sent: tuple[FileChange, ...]
    created: bool


def check_target(target: Target) -> None:
    """Refuse what cannot be, before anything is read. Raises BadInputError."""
    if faults := [message for _, message in target_faults(target)]:
        raise BadInputError("\n".join(faults))


def check_login() -> None:
    """Raise BadInputError where ``huggingface_hub`` has no token to publish with."""
    from mlxq.machine.runtime import logged_in

    if not logged_in():
        raise BadInputError(
            "there is no Hub login here, and publishing needs one", "Run hf auth login, or set HF_TOKEN."
        )


def check_folder(folder: Path, *, force: bool = False) -> Checked:
    """Prove that ``folder`` holds a whole model, as mlxq made it: every file, every hash, and that it loads.

    The card is excused: a person may edit it. Raises BadInputError with every problem; ``force`` lets all pass but
    a missing ``mlxq.json``, without which there is nothing to publish by.
    """
    if not (folder / FILE_NAME).is_file():
        unfinished = folder.name.endswith(".partial") or folder.with_name(folder.name + ".partial").is_dir()
        raise BadInputError(
            f"{folder} is no finished model of mlxq: it has no {FILE_NAME}",
            "It was interrupted: run the command that made it again, and it continues."
            if unfinished
            else "Name the folder that mlxq quantize or mlxq convert wrote.",
        )
    report = read_report(folder / FILE_NAME)
    recorded: dict[str, dict[str, Any]] = report["files"]
    found = hash_files(folder)
    problems = [
        f"{name} is missing" if name not in found else f"{name} is not what was written: its SHA-256 differs"
        for name, facts in recorded.items()
        if name not in _DRAWN and found.get(name, {}).get("sha256") != facts["sha256"]
    ]
    foreign = [name for name in found if name not in recorded and name not in _DRAWN]
    weights = [name for name in foreign if fnmatch.fnmatch(name, _WEIGHTS[0])]
    problems += [f"{name} holds weights that mlxq did not write" for name in weights]
    if not problems or force:
        try:
            open_lazily(folder, str(folder), trust_remote_code=bool(report["options"].get("trust_remote_code")))
        except BadInputError as exc:
            problems.append(f"it does not load: {exc.message}")
    if problems and not force:
        raise BadInputError(
            "\n".join(f"{folder}: {problem}" for problem in problems),
            "Make it again, or publish it as it is with --force.",
        )
    files = {name: facts for name, facts in found.items() if name in recorded or name in weights}
    left_out = tuple(name for name in foreign if name not in weights)
    kept = {name: facts for name, facts in files.items() if name not in _DRAWN}
    return Checked(folder, report, kept, _plot(report), tuple(problems), left_out)


def preview(checked: Checked, target: Target, *, force: bool = False) -> Generator[Waiting, None, Outlook]:
    """What publishing would do, from what the Hub holds now; nothing is changed anywhere.

    Raises BadInputError where it would be refused, MlxqError where the Hub cannot be asked.
    """
    outlook = yield from _patiently(lambda: _look(checked, target, force=force), target)
    _refuse(outlook.remote, target, force=force)
    return outlook


def publish(checked: Checked, target: Target, *, force: bool = False) -> Iterator[Step | Waiting | Published]:
    """Publish ``checked`` at ``target``; the last event is ``Published``.

    The repository is created here and not before, so a refusal leaves none. What the Hub holds already is not sent
    again, whether from an earlier upload or from one that broke. Afterwards the hashes there are compared with those
    here, and the card, its plot and ``mlxq.json`` are left in the folder as they were published. Raises
    BadInputError where the Hub refuses, MlxqError where it cannot be reached or holds something else in the end.
    """
    check_login()
    api = _api()
    outlook = yield from preview(checked, target, force=force)
    created = not outlook.remote.exists
    if created:
        yield Step(f"creating {target.repo}")
        yield from _patiently(
            lambda: api.create_repo(target.repo, private=target.private or None, exist_ok=True), target
        )
    if not outlook.remote.branch_exists and target.branch != "main":
        yield Step(f"creating branch {target.branch}")
        yield from _patiently(lambda: api.create_branch(target.repo, branch=target.branch, exist_ok=True), target)
    sent = outlook.named("new", "changed")
    size = sum(change.size_bytes for change in sent)
    if sent:
        yield Step(f"sending {len(sent)} files, {size / 1e6:,.1f} MB")
    done = yield from _patiently(lambda: _send(checked, target, force=force), target)
    after = yield from _patiently(lambda: _files_of(api, target.repo, done.reference), target)
    _prove(checked, done.drawn, after, target)
    _keep(done.drawn, checked.folder)
    if target.collection:
        yield Step(f"adding it to collection {target.collection}")
        yield from _add_to_collection(api, target)
    url = done.pull_request or f"{api.endpoint}/{target.repo}"
    yield Published(url, done.commit, done.pull_request, outlook.named("new", "changed", "removed"), created)


# What is there, and what it would become.


def _look(checked: Checked, target: Target, *, force: bool) -> Outlook:
    api = _api()
    remote = _remote(api, target)
    drawn = _draw(checked, target, _card_to_keep(api, checked, target, remote, force=force))
    ours = {
        **{name: (facts["bytes"], facts["sha256"]) for name, facts in checked.files.items()},
        **{name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in drawn.items()},
    }
    changes = [
        FileChange(name, size, _change(remote.files.get(name), sha256, drawn.get(name), checked.folder / name))
        for name, (size, sha256) in sorted(ours.items())
    ]
    stale = [
        FileChange(name, there.size_bytes, "removed")
        for name, there in remote.files.items()
        if name not in ours and (name == PLOT or any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHTS))
    ]
    return Outlook(remote, (*changes, *stale), drawn)


def _change(there: RemoteFile | None, sha256: str, content: bytes | None, file: Path) -> str:
    if there is None:
        return "new"
    if there.sha256 is not None:
        return "unchanged" if there.sha256 == sha256 else "changed"
    # Kept in git itself, so it is small enough to be read whole.
    return "unchanged" if there.git_hash == _git_hash(file.read_bytes() if content is None else content) else "changed"


def _git_hash(content: bytes) -> str:
    """Git's name for a blob: SHA-1 over its length and content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _remote(api: HfApi, target: Target) -> Remote:
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
    return Remote(True, info.private, branch_exists, info.sha, _files_of(api, target.repo, info.sha))


def _files_of(api: HfApi, repo: str, revision: str) -> dict[str, RemoteFile]:
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in api.list_repo_tree(repo, revision=revision, recursive=True)
        if isinstance(entry, RepoFile)
    }


def _remote_text(api: HfApi, target: Target, remote: Remote, name: str) -> str | None:
    if name not in remote.files:
        return None
    with _no_progress_bars():
        return card.as_text(Path(api.hf_hub_download(target.repo, name, revision=remote.commit)).read_bytes())


def _plot(report: Mapping[str, Any]) -> bytes | None:
    from mlxq.comparison import charts

    measured = report.get("comparison")
    return charts.as_png(charts.one_model(measured)) if measured and "kl_histogram" in measured else None


def _draw(checked: Checked, target: Target, existing: str | None) -> dict[str, bytes]:
    """The files that are written for publishing: the plot where something was measured, the card, ``mlxq.json``."""
    drawn = {} if checked.plot is None else {PLOT: checked.plot}
    ours = card.make_card(checked.report, target.repo, checked.folder, PLOT if PLOT in drawn else None)
    drawn[card.FILE_NAME] = card.render(ours, existing, old_name=checked.folder.name).encode()
    files = {name: facts for name, facts in checked.report["files"].items() if name != PLOT}
    files |= {name: card.file_facts(content) for name, content in drawn.items()}
    drawn[FILE_NAME] = report_bytes(_without_paths({**checked.report, "files": files}))
    return drawn


def _without_paths(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report as the world may read it: of a folder on this machine only its name."""
    shown = dict(report)
    for key, named in (("source", "name"), ("comparison", "reference")):
        part = shown.get(key)
        if isinstance(part, dict) and Path(str(part.get(named, ""))).is_absolute():
            shown[key] = {**part, named: Path(part[named]).name}
    return shown


def _card_to_keep(api: HfApi, checked: Checked, target: Target, remote: Remote, *, force: bool) -> str | None:
    """The card that holds a person's words: the one here, or the one on the Hub.

    A card that has the hash which the ``mlxq.json`` beside it records was not edited since. Raises BadInputError
    where both were, each in its own way.
    """
    file = checked.folder / card.FILE_NAME
    here = card.as_text(file.read_bytes()) if file.is_file() else None
    there = _remote_text(api, target, remote, card.FILE_NAME)
    if there is None or here is None:
        return there if here is None else here
    if card.own_words(here) == card.own_words(there):
        return here
    report = json.loads(_remote_text(api, target, remote, FILE_NAME) or "{}")
    if _as_recorded(there, report):
        return here
    if _as_recorded(here, checked.report):
        return there
    if force:
        return here
    raise BadInputError(
        f"the card was edited in two places: {file}, and the one on the Hub",
        "Bring your words together in the file here and publish it with --force.",
    )


def _as_recorded(text: str, report: Mapping[str, Any]) -> bool:
    recorded = report.get("files", {}).get(card.FILE_NAME, {}).get("sha256")
    return bool(recorded == hashlib.sha256(text.encode()).hexdigest())


def _refuse(remote: Remote, target: Target, *, force: bool) -> None:
    if not remote.exists and target.create_pr:
        raise BadInputError(
            f"there is no {target.repo} that you can see to open a pull request on",
            "Leave --create-pr out to create it.",
        )
    if remote.exists and target.private and not remote.private:
        raise BadInputError(
            f"{target.repo} exists and is public, and --private was asked for",
            "Make it private in its settings on the Hub, or leave --private out.",
        )
    foreign = [name for name in remote.files if fnmatch.fnmatch(name, _WEIGHTS[0])]
    if foreign and FILE_NAME not in remote.files and not force:
        raise BadInputError(
            f"{target.repo} holds weights that mlxq did not write, such as {foreign[0]}",
            "Name another repository, or replace them with --force.",
        )


# Sending.


@dataclass(frozen=True)
class _Sent:
    """The commit that holds it all, and the revision to read it at; ``drawn`` as in Outlook."""

    commit: str
    reference: str
    pull_request: str | None
    drawn: Mapping[str, bytes]


def _send(checked: Checked, target: Target, *, force: bool) -> _Sent:
    """Send all that differs from what the Hub holds now; where nothing does, send nothing."""
    api = _api()
    outlook = _look(checked, target, force=force)
    commit = outlook.remote.commit
    assert commit is not None
    sent, stale = outlook.named("new", "changed"), outlook.named("removed")
    if not sent and not stale:
        return _Sent(commit, commit, None, outlook.drawn)
    bits = checked.report["metrics"]["bits_per_weight"]
    with tempfile.TemporaryDirectory(prefix="mlxq-upload-") as temporary:
        for change in sent:
            staged = Path(temporary) / change.name
            if change.name in outlook.drawn:
                staged.write_bytes(outlook.drawn[change.name])
            else:
                staged.symlink_to((checked.folder / change.name).resolve())
        done = api.upload_folder(
            repo_id=target.repo,
            folder_path=temporary,
            delete_patterns=[change.name for change in stale] or None,
            revision=target.revision,
            create_pr=target.create_pr,
            commit_message=target.message or f"{bits:.2f} bits per weight, with mlxq {__version__}",
            parent_commit=commit,
        )
    return _Sent(done.oid, done.pr_revision or done.oid, done.pr_url, outlook.drawn)


def _prove(checked: Checked, drawn: Mapping[str, bytes], after: Mapping[str, RemoteFile], target: Target) -> None:
    """Raise MlxqError unless the Hub now holds what is here."""
    for name, facts in checked.files.items():
        if _change(after.get(name), facts["sha256"], None, checked.folder / name) != "unchanged":
            raise MlxqError(f"{target.repo} does not hold {name} as it is here", "Run the same command again.")
    for name, content in drawn.items():
        if _change(after.get(name), hashlib.sha256(content).hexdigest(), content, Path(name)) != "unchanged":
            raise MlxqError(f"{target.repo} does not hold {name} as it is here", "Run the same command again.")


def _keep(drawn: Mapping[str, bytes], folder: Path) -> None:
    """Leave the folder as it was published; one that cannot be written to stays as it was."""
    for name, content in drawn.items():
        temporary = folder / f"{name}.new"
        with suppress(PermissionError):
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)


def _add_to_collection(api: HfApi, target: Target) -> Generator[Waiting, None, None]:
    assert target.collection is not None
    slug = target.collection
    try:
        yield from _patiently(
            lambda: api.add_collection_item(slug, item_id=target.repo, item_type="model", exists_ok=True), target
        )
    except MlxqError as exc:
        raise type(exc)(
            f"{target.repo} is published, but was not added to collection {slug}: {exc.message}",
            "The collection's id is the end of its address on the Hub; run the same command with it again.",
        ) from exc


# Asking the Hub, with patience and in words.


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="mlxq", library_version=__version__)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """For files too small for a bar."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _patiently(call: Callable[[], _T], target: Target) -> Generator[Waiting, None, _T]:
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
        return MlxqError(f"the Hub still limits how often it may be asked, after {TRIES} tries", again)
    if status >= 500:
        return MlxqError(f"the Hub has trouble of its own: it answered {status}", again)
    return BadInputError(f"the Hub refused ({status}): {said_by(exc)}")
