"""What stands where a model is to be written: nothing that is not mlxq's, or not only a model, is ever taken away."""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from mlxq.errors import BadInputError
from mlxq.headers import read_json
from mlxq.sources.base import ModelSource
from mlxq.sources.belongings import READ, TEMPLATES, travels
from mlxq.writing.journal import NAME as JOURNAL
from mlxq.writing.journal import read_entries

# Inside OUT.partial: the model being written, and what of its source is needed at the time.
MODEL = "model"
SOURCE = "source"
# Files that a folder with a model in it may hold, beside those that travel with one.
MODEL_FILES = (
    *READ,
    "model*.safetensors",
    "mlxq.json",
    "mlxq.json.new",
    "README.md.new",
    "mlxq-comparison.png",
    "mlxq-comparison.png.new",
    ".gitattributes",
    ".DS_Store",
)


def partial_of(out: Path) -> Path:
    """Where ``out`` is written until it is whole."""
    return out.with_name(out.name + ".partial")


def replaced_of(out: Path) -> Path:
    """Where the model that ``out`` replaces is kept until the new one stands."""
    return out.with_name(out.name + ".replaced")


def check_output(source: ModelSource, out: Path, *, force: bool) -> None:
    """Raise BadInputError for an ``out`` that cannot be made, or whose making would take other things with it."""
    if out.name in ("", ".."):
        raise BadInputError(f"{out} is no name for a new folder", "Give it one: -o NAME.")
    for folder in (out, partial_of(out), replaced_of(out)):
        if _holds_source(folder, source):
            raise BadInputError(f"{folder} holds the model that it would be made from", "Choose another -o.")
    # Where it vanishes while it is looked at, another run has ended, and its folder is not in the way.
    with contextlib.suppress(FileNotFoundError):
        check_partial(partial_of(out), source)
    if os.path.lexists(out):
        if not force:
            raise BadInputError(f"{out} already exists", "Choose another -o, or replace it with --force.")
        check_replaceable(out)
        if os.path.lexists(replaced_of(out)) and not left_aside(out):
            raise BadInputError(f"{replaced_of(out)} is in the way", "Move it away, or choose another -o.")


def left_aside(out: Path) -> bool:
    """Whether a run that was stopped while it replaced ``out`` left the older model, or some of it, aside.

    Its journal says that it was about to, which it does only where nothing else has that name.
    """
    old, journal = replaced_of(out), partial_of(out) / JOURNAL
    if not old.is_dir() or old.is_symlink() or not journal.is_file():
        return False
    return read_entries(journal).replacing and not any(_foreign(old, _recorded(old)))


def check_replaceable(out: Path) -> None:
    """Raise BadInputError unless ``out`` is a folder that is empty, or holds a model and nothing else."""
    if out.is_symlink():
        raise BadInputError(
            f"{out} is a link, and --force replaces only a folder", f"Name the folder: -o {out.resolve()}."
        )
    hint = "Remove it, or choose another -o."
    if not out.is_dir():
        raise BadInputError(f"{out} is not a model folder, and --force replaces nothing else", hint)
    if not any(out.iterdir()):
        return
    recorded = _recorded(out)
    if not recorded and not ((out / "config.json").is_file() and any(out.glob("model*.safetensors"))):
        raise BadInputError(f"{out} is not a model folder, and --force replaces nothing else", hint)
    foreign = next(_foreign(out, recorded), None)
    if foreign is not None:
        raise BadInputError(
            f"{out} holds {foreign}, which is no part of a model, and --force replaces nothing else",
            "Move that away, or choose another -o.",
        )


def check_partial(partial: Path, source: ModelSource) -> None:
    """Raise BadInputError unless ``partial`` is not there, or empty, or mlxq's own by its journal."""
    if not os.path.lexists(partial):
        return
    hint = "Move it away, or choose another -o: work goes only to a folder of mlxq's own."
    if partial.is_symlink():
        raise BadInputError(f"{partial} is a link, and is in the way", hint)
    if not partial.is_dir():
        raise BadInputError(f"{partial} is no folder, and is in the way", hint)
    names = {entry.name for entry in partial.iterdir()}
    linked = {name for name in names if (partial / name).is_symlink()}
    folders = {name for name in names if (partial / name).is_dir()} - linked
    files = {name for name in names if (partial / name).is_file()} - linked
    foreign = sorted(names - (folders & {MODEL, SOURCE}) - (files & {JOURNAL}))
    if not foreign and MODEL in folders:
        foreign = [f"{MODEL}/{name}" for name in _foreign(partial / MODEL, source.sidecars.keys())]
    if not foreign and names and not (JOURNAL in names and _journal_is_ours(partial / JOURNAL, MODEL in folders)):
        foreign = sorted(names)
    if foreign:
        raise BadInputError(f"{partial} holds {foreign[0]}, which mlxq did not write there", hint)


def _journal_is_ours(journal: Path, has_model: bool) -> bool:
    """Whether mlxq wrote it; what power loss leaves of a new one, nothing or zeros, is nobody's loss."""
    if read_entries(journal).plan is not None or has_model:
        return True
    return not journal.read_bytes().strip(b"\0")


def _recorded(folder: Path) -> frozenset[str]:
    """Names of the files that the ``mlxq.json`` in ``folder`` speaks of; empty where there is none of mlxq's."""
    file = folder / "mlxq.json"
    try:
        report = read_json(file) if file.is_file() else {}
    except BadInputError:
        return frozenset()
    files = report.get("files")
    if report.get("schema") != "mlxq.report" or not isinstance(files, dict):
        return frozenset()
    return frozenset(map(str, files))


def _foreign(folder: Path, known: Collection[str]) -> Iterator[str]:
    """What ``folder`` holds that no model does, and that is not ``known``, by name."""
    for entry in sorted(folder.iterdir()):
        templates = entry.name == TEMPLATES and entry.is_dir() and not entry.is_symlink()
        for each in sorted(entry.iterdir()) if templates else [entry]:
            name = each.relative_to(folder).as_posix()
            if not each.is_file() or not (name in known or _is_listed(name)):
                yield name


def _is_listed(name: str) -> bool:
    """Whether a file of this name, by its path inside a folder, may be a model's."""
    return travels(name, trusted=False) or any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)


def _holds_source(folder: Path, source: ModelSource) -> bool:
    """Whether ``folder`` is where the source lies, or above it, under any name, or has its weights under another."""
    if source.remote is not None:
        return False
    target = folder.resolve()
    places = {each for file in source.weight_files for each in (file.absolute(), file.resolve())}
    above = {path for place in places for path in (place, *place.parents)}
    if target in above:
        return True
    if not folder.exists():
        return False
    # A bind mount, or a file system that does not tell A from a.
    if _identity(folder) in {_identity(path) for path in above}:
        return True
    weights = {_identity(file) for file in source.weight_files}
    inside = folder.iterdir() if folder.is_dir() else ()
    return any(_identity(entry) in weights for entry in inside if entry.is_file())


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
