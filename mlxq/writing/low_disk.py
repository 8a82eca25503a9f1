"""Fetch a model shard by shard while it is written, so that the disk never holds all of it.

Steps are ordered by the last shard they need. Each shard comes to a folder of its own inside ``OUT.partial`` while
the steps of the one before are encoded, and is dropped once no later step needs it.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlxq.architecture.origins import origins
from mlxq.errors import BadInputError
from mlxq.methods.formats import HELPER_PARTS
from mlxq.planning.plan import Plan, Step
from mlxq.retry import Waiting
from mlxq.sources.base import ModelSource
from mlxq.sources.download import Downloading, Transfer
from mlxq.sources.hub import partly_opened
from mlxq.sources.remote import RemoteFile
from mlxq.writing.execute import Written, execute
from mlxq.writing.folder import PartialFolder


@dataclass(frozen=True)
class ShardSteps:
    """``steps`` that can be done once ``shard`` is here too; after them the ``dropped`` shards are not needed."""

    shard: RemoteFile
    steps: tuple[Step, ...]
    dropped: tuple[str, ...]


def steps_by_shard(plan: Plan, done: Collection[str] = ()) -> tuple[ShardSteps, ...]:
    """The order in which shards are fetched, for the steps whose path is not in ``done``.

    Raises BadInputError where the plan needs the weights more than once.
    """
    remote = plan.source.remote
    assert remote is not None, "the weights are here already"
    check_low_disk(plan)
    position = {file.name: number for number, file in enumerate(remote.weights)}
    by_last: dict[int, list[Step]] = defaultdict(list)
    last_use: dict[str, int] = {}
    for step, needed in _shards_needed(plan):
        if step.path in done:
            continue
        last = max((position[name] for name in needed), default=0)
        by_last[last].append(step)
        for name in needed or {remote.weights[0].name}:
            last_use[name] = max(last_use.get(name, 0), last)
    return tuple(
        ShardSteps(file, tuple(by_last[number]), tuple(n for n, last in last_use.items() if last == number))
        for number, file in enumerate(remote.weights)
        if file.name in last_use
    )


def check_low_disk(plan: Plan) -> None:
    """Raise BadInputError where a plan needs the weights of its source more than once."""
    guided = "calibration runs" if any(step.guided for step in plan.steps) else None
    what = "a budget measures" if plan.recipe.budget else "a gate compares with" if plan.recipe.gates else guided
    if plan.source.remote is not None and what is not None:
        raise BadInputError(
            f"--low-disk reads each file of the source once, and {what} the whole of it",
            "Leave --low-disk out, or use a recipe without budget and gates, and with calibration: none.",
        )


def most_held_bytes(planned: tuple[ShardSteps, ...]) -> int:
    """Bytes of source on the disk at once, at most: the shards in use, and the next one on its way."""
    sizes = {part.shard.name: part.shard.nbytes for part in planned}
    held = most = 0
    for part, following in zip(planned, (*planned[1:], None), strict=True):
        held += part.shard.nbytes
        most = max(most, held + (following.shard.nbytes if following else 0))
        held -= sum(sizes[name] for name in part.dropped)
    return most


def execute_by_shards(plan: Plan, folder: PartialFolder) -> Iterator[Written | Downloading | Waiting]:
    """``execute`` with the weights fetched as they are needed and dropped after.

    Raises MlxqError where the Hub or the disk fails; finished steps and complete shards stay for the next run.
    """
    remote = plan.source.remote
    assert remote is not None, "the weights are here already"
    planned = steps_by_shard(plan, folder.done)
    place = folder.source_folder
    place.mkdir(exist_ok=True)
    _drop_what_is_not_needed(place, {part.shard.name for part in planned})
    here: dict[str, Path] = {}
    coming = Transfer(remote, [planned[0].shard], place) if planned else None
    try:
        for part, following in zip(planned, (*planned[1:], None), strict=True):
            assert coming is not None
            here |= yield from coming.wait()
            coming = Transfer(remote, [following.shard], place) if following else None
            if part.steps:
                local = plan.with_source(partly_opened(remote, plan.source.name, here))
                yield from execute(local, folder, steps=part.steps)
            for name in part.dropped:
                here.pop(name).unlink()
    finally:
        if coming is not None:
            coming.stop()
    shutil.rmtree(place)


def _drop_what_is_not_needed(place: Path, needed: Collection[str]) -> None:
    """Of an earlier run that was killed, keep complete shards that are still to be read."""
    for file in place.rglob("*.incomplete"):
        file.unlink()
    for file in place.iterdir():
        if file.is_file() and file.name not in needed:
            file.unlink()


def _shards_needed(plan: Plan) -> Iterator[tuple[Step, frozenset[str]]]:
    """Each step, and the weight files that hold what it is made from."""
    made_from: Mapping[str, frozenset[str]] = {}
    if any(step.source is None for step in plan.steps):
        made_from = origins(plan.source)
    for step in plan.steps:
        if step.source is not None:
            tensors = frozenset([step.source])
        else:
            module = step.path.rpartition(".")[0]
            parts = (f"{module}.{part}" for part in HELPER_PARTS) if step.dequantize else ()
            tensors = frozenset().union(*(made_from.get(path, frozenset()) for path in (step.path, *parts)))
        yield step, frozenset(_file_of(plan.source, name) for name in tensors)


def _file_of(source: ModelSource, tensor: str) -> str:
    """The weight file that holds a tensor, by its name in the repository."""
    assert source.remote is not None
    name = source.file_of(tensor).name
    return next(file.name for file in source.remote.weights if Path(file.name).name == name)
