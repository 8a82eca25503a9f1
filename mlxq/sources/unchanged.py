"""Whether a source is still what it was when it was opened: a mix of two versions is no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.errors import MlxqError
from mlxq.files import states_of

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource


def check_unchanged(source: ModelSource) -> None:
    """Raise MlxqError where a file of ``source`` is not what it was when the source was opened.

    What is still on the Hub is named by its commit, and cannot change.
    """
    if source.remote is not None:
        return
    now = states_of(files_of(source))
    for file in sorted({*source.as_opened, *now}):
        before, after = source.as_opened.get(file), now.get(file)
        if before == after:
            continue
        happened = "is gone since" if after is None else "is new since" if before is None else "changed after"
        raise MlxqError(
            f"{file} {happened} {source.name} was opened, so the output would be a mix of two models",
            "See that nothing writes to it, and run the same command again: it reads anew what changed.",
        )


def files_of(source: ModelSource) -> tuple[Path, ...]:
    """The files that a model is made from, whether they are there or not."""
    companions = [each for each in source.sidecars.values() if isinstance(each, Path)]
    folder = source.weights_folder
    names = ("config.json", "model.safetensors.index.json") if folder is not None else ()
    return (*source.weight_files, *companions, *(Path(folder or "", name) for name in names))
