"""Publishing a model on the Hub: looked at, sent, and checked there."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq import __version__
from mlxq.errors import MlxqError
from mlxq.files import write_durably
from mlxq.publish.check import Checked
from mlxq.publish.hub import HubFile, asked_patiently, check_login, files_of, hub_api
from mlxq.publish.outlook import FileChange, Outlook, change_of, look, refuse
from mlxq.recipe.target import Target
from mlxq.retry import Waiting

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class Doing:
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


def preview(checked: Checked, target: Target, *, force: bool = False) -> Generator[Waiting, None, Outlook]:
    """What publishing would do, from what the Hub holds now; nothing is changed anywhere.

    Raises BadInputError where it would be refused, MlxqError where the Hub cannot be asked.
    """
    outlook = yield from asked_patiently(lambda: look(checked, target, force=force), target)
    refuse(outlook.remote, target, force=force)
    return outlook


def publish(checked: Checked, target: Target, *, force: bool = False) -> Iterator[Doing | Waiting | Published]:
    """Publish ``checked`` at ``target``; the last event is ``Published``.

    The repository is created here and not before, so a refusal leaves none. What the Hub holds already is not sent
    again, whether from an earlier upload or from one that broke. Afterwards the hashes there are compared with those
    here, and the card, its plot and ``mlxq.json`` are left in the folder as they were published. Raises
    BadInputError where the Hub refuses, MlxqError where it cannot be reached or holds something else in the end.
    """
    check_login()
    api = hub_api()
    outlook = yield from preview(checked, target, force=force)
    created = not outlook.remote.exists
    if created:
        yield Doing(f"creating {target.repo}")
        yield from asked_patiently(
            lambda: api.create_repo(target.repo, private=target.private or None, exist_ok=True), target
        )
    if not outlook.remote.branch_exists and target.branch != "main":
        yield Doing(f"creating branch {target.branch}")
        yield from asked_patiently(lambda: api.create_branch(target.repo, branch=target.branch, exist_ok=True), target)
    sent = outlook.named("new", "changed")
    size = sum(change.size_bytes for change in sent)
    if sent:
        yield Doing(f"sending {len(sent)} files, {size / 1e6:,.1f} MB")
    done = yield from asked_patiently(lambda: _send(checked, target, force=force), target)
    after = yield from asked_patiently(lambda: files_of(api, target.repo, done.reference), target)
    _prove(checked, done.drawn, after, target)
    _keep(done.drawn, checked.folder)
    if target.collection:
        yield Doing(f"adding it to collection {target.collection}")
        yield from _add_to_collection(api, target)
    url = done.pull_request or f"{api.endpoint}/{target.repo}"
    yield Published(url, done.commit, done.pull_request, outlook.named("new", "changed", "removed"), created)


@dataclass(frozen=True)
class _Sent:
    """The commit that holds it all, and the revision to read it at; ``drawn`` as in Outlook."""

    commit: str
    reference: str
    pull_request: str | None
    drawn: Mapping[str, bytes]


def _send(checked: Checked, target: Target, *, force: bool) -> _Sent:
    """Send all that differs from what the Hub holds now; where nothing does, send nothing."""
    api = hub_api()
    outlook = look(checked, target, force=force)
    commit = outlook.remote.commit
    assert commit is not None
    sent, stale = outlook.named("new", "changed"), outlook.named("removed")
    if not sent and not stale:
        return _Sent(commit, commit, None, outlook.drawn)
    bits = checked.report["metrics"]["bits_per_weight"]
    with tempfile.TemporaryDirectory(prefix="mlxq-upload-") as temporary:
        for change in sent:
            staged = Path(temporary) / change.name
            staged.parent.mkdir(exist_ok=True)
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


def _prove(checked: Checked, drawn: Mapping[str, bytes], after: Mapping[str, HubFile], target: Target) -> None:
    """Raise MlxqError unless the Hub now holds what is here."""
    for name, facts in checked.files.items():
        if change_of(after.get(name), facts["sha256"], None, checked.folder / name) != "unchanged":
            raise MlxqError(f"{target.repo} does not hold {name} as it is here", "Run the same command again.")
    for name, content in drawn.items():
        if change_of(after.get(name), hashlib.sha256(content).hexdigest(), content, Path(name)) != "unchanged":
            raise MlxqError(f"{target.repo} does not hold {name} as it is here", "Run the same command again.")


def _keep(drawn: Mapping[str, bytes], folder: Path) -> None:
    """Leave the folder as it was published; one that cannot be written to stays as it was."""
    for name, content in drawn.items():
        with suppress(PermissionError):
            write_durably(folder / name, content)


def _add_to_collection(api: HfApi, target: Target) -> Generator[Waiting, None, None]:
    assert target.collection is not None
    slug = target.collection
    try:
        yield from asked_patiently(
            lambda: api.add_collection_item(slug, item_id=target.repo, item_type="model", exists_ok=True), target
        )
    except MlxqError as exc:
        raise type(exc)(
            f"{target.repo} is published, but was not added to collection {slug}: {exc.message}",
            "The collection's id is the end of its address on the Hub; run the same command with it again.",
        ) from exc
