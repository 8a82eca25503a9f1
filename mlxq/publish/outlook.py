"""What publishing would do: each file here against what the Hub holds, and the card as it would be."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.headers import json_object
from mlxq.places import place_in
from mlxq.publish import card
from mlxq.publish.check import WEIGHTS, Checked
from mlxq.publish.hub import HubFile, Remote, git_hash, hub_api, remote_state, remote_text
from mlxq.reading import read_bytes
from mlxq.recipe.target import Target
from mlxq.sources.front_matter import FILE_NAME as CARD
from mlxq.sources.front_matter import as_text
from mlxq.writing.report import FILE_NAME, report_bytes, shareable
from mlxq.writing.report_shape import fault_of_report
from mlxq.writing.verify import PLOT

if TYPE_CHECKING:
    from huggingface_hub import HfApi


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
        return self.drawn[CARD].decode()

    def named(self, *changes: str) -> tuple[FileChange, ...]:
        """The files with one of these changes."""
        return tuple(each for each in self.changes if each.change in changes)


def look(checked: Checked, target: Target, *, force: bool) -> Outlook:
    """Hold what is here against what the Hub holds now.

    Raises BadInputError where the card was edited both here and there, and ``force`` is not given.
    """
    api = hub_api()
    remote = remote_state(api, target)
    drawn = _draw(checked, target, _card_to_keep(api, checked, target, remote, force=force))
    ours = {
        **{name: (facts["bytes"], facts["sha256"]) for name, facts in checked.files.items()},
        **{name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in drawn.items()},
    }
    changes = [
        FileChange(name, size, change_of(remote.files.get(name), sha256, drawn.get(name), checked.folder / name))
        for name, (size, sha256) in sorted(ours.items())
    ]
    stale = [
        FileChange(name, there.size_bytes, "removed")
        for name, there in remote.files.items()
        if name not in ours and (name == PLOT or any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS))
    ]
    return Outlook(remote, (*changes, *stale), drawn)


def change_of(there: HubFile | None, sha256: str, content: bytes | None, file: Path) -> str:
    """How ``content``, or ``file`` where that is None, differs from what is ``there``: see ``FileChange``."""
    if there is None:
        return "new"
    if there.sha256 is not None:
        return "unchanged" if there.sha256 == sha256 else "changed"
    # Kept in git itself, so it is small enough to be read whole.
    return "unchanged" if there.git_hash == git_hash(read_bytes(file) if content is None else content) else "changed"


def _draw(checked: Checked, target: Target, existing: str | None) -> dict[str, bytes]:
    """The files that are written for publishing: the plot where something was measured, the card, ``mlxq.json``."""
    drawn = {} if checked.plot is None else {PLOT: checked.plot}
    ours = card.make_card(shareable(checked.report), target.repo, checked.folder, PLOT if PLOT in drawn else None)
    drawn[CARD] = card.render(ours, existing, old_name=checked.folder.name).encode()
    files = {name: facts for name, facts in checked.report["files"].items() if name != PLOT}
    files |= {name: card.file_facts(content) for name, content in drawn.items()}
    drawn[FILE_NAME] = report_bytes({**checked.report, "files": files})
    _check_places(drawn)
    return drawn


def _check_places(drawn: Mapping[str, bytes]) -> None:
    """Raise BadInputError where what is published names a folder that tells whose machine this is."""
    for name in (CARD, FILE_NAME):
        if found := place_in(drawn[name].decode()):
            raise BadInputError(
                f"{name} names {found}, a folder of this machine", "Take it out before it is published."
            )


def _their_report(text: str | None) -> dict[str, Any]:
    """The ``mlxq.json`` on the Hub; what is none says nothing of the card beside it."""
    try:
        report = json_object((text or "{}").encode(), FILE_NAME)
    except BadInputError:
        return {}
    return {} if fault_of_report(report) is not None else report


def _card_to_keep(api: HfApi, checked: Checked, target: Target, remote: Remote, *, force: bool) -> str | None:
    """The card that holds a person's words: the one here, or the one on the Hub.

    A card that has the hash which the ``mlxq.json`` beside it records was not edited since. Raises BadInputError
    where both were, each in its own way.
    """
    file = checked.folder / CARD
    here = as_text(read_bytes(file)) if file.exists() else None
    there = remote_text(api, target, remote, CARD)
    if there is None or here is None:
        return there if here is None else here
    if card.own_words(here) == card.own_words(there):
        return here
    report = _their_report(remote_text(api, target, remote, FILE_NAME))
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
    recorded = report.get("files", {}).get(CARD, {}).get("sha256")
    return bool(recorded == hashlib.sha256(text.encode()).hexdigest())


def refuse(remote: Remote, target: Target, *, force: bool) -> None:
    """Raise BadInputError where publishing would touch what it should not."""
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
    foreign = [name for name in remote.files if fnmatch.fnmatch(name, WEIGHTS[0])]
    if foreign and FILE_NAME not in remote.files and not force:
        raise BadInputError(
            f"{target.repo} holds weights that mlxq did not write, such as {foreign[0]}",
            "Name another repository, or replace them with --force.",
        )
