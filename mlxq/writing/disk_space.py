"""How much disk a run needs, known before it starts."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlxq.errors import BadInputError, MlxqError
from mlxq.planning.plan import Plan
from mlxq.sources.hub_files import cached_file
from mlxq.writing.low_disk import most_held_bytes, steps_by_shard
from mlxq.writing.standing import partial_of


@dataclass(frozen=True)
class DiskUse:
    """Disk that making a model takes, in bytes.

    ``download_bytes`` come from the Hub; of them, ``source_bytes`` are on the disk at once, at most, in ``source``.
    ``output_bytes`` are written to ``output``: weights, and files that travel along. Shards are counted where
    ``low_disk``.
    """

    download_bytes: int
    source_bytes: int
    source: Path
    output_bytes: int
    output: Path
    shard_count: int
    low_disk: bool


def disk_use(plan: Plan, out: Path, *, low_disk: bool = False) -> DiskUse:
    """Reckon it from the plan and the headers. Raises BadInputError where the plan cannot be made with low disk."""
    from huggingface_hub import constants

    remote = plan.source.remote
    output = _existing(out.absolute().parent)
    if remote is None:
        sidecars = plan.source.sidecars.values()
        carried = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in sidecars)
        return DiskUse(0, 0, output, plan.file_bytes + carried, output, 0, False)
    cache = _existing(Path(constants.HF_HUB_CACHE))
    absent = [
        f for f in (*remote.weights, *remote.companions) if cached_file(remote.repo, f.name, remote.commit) is None
    ]
    download = sum(file.nbytes for file in absent)
    written = plan.file_bytes + sum(file.nbytes for file in remote.companions)
    if not low_disk:
        return DiskUse(download, download, cache, written, output, len(remote.weights), False)
    held = most_held_bytes(steps_by_shard(plan))
    return DiskUse(download, held, output, written, output, len(remote.weights), True)


def check_disk(plan: Plan, out: Path, *, low_disk: bool = False) -> None:
    """Raise MlxqError where the free disk does not hold what is to be fetched and written."""
    if plan.source.remote is None:
        return
    use = disk_use(plan, out, low_disk=low_disk)
    partial = partial_of(out)
    taken = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file()) if partial.is_dir() else 0
    wanted = {use.output: use.output_bytes - taken}
    same = os.stat(use.source).st_dev == os.stat(use.output).st_dev
    place = use.output if same else use.source
    wanted[place] = wanted.get(place, 0) + use.source_bytes
    for folder, nbytes in wanted.items():
        free = shutil.disk_usage(folder).free
        if nbytes <= free:
            continue
        parts = f"{use.source_bytes:,} bytes of source" if folder == place else ""
        if folder == use.output:
            parts += f"{' and ' if parts else ''}{use.output_bytes:,} bytes of output"
        raise MlxqError(
            f"{folder} needs room for {parts}, and has {free + max(taken, 0):,} bytes free: "
            f"{nbytes - free:,} bytes are missing",
            _way_out(plan, out, use),
        )


def _way_out(plan: Plan, out: Path, use: DiskUse) -> str:
    elsewhere = "Free some space, choose another -o, or set HF_HUB_CACHE to a folder on a larger disk."
    if use.low_disk:
        return elsewhere
    try:
        small = disk_use(plan, out, low_disk=True)
    except BadInputError:
        return elsewhere
    if small.source_bytes >= use.source_bytes:
        return elsewhere
    return f"--low-disk needs {small.source_bytes:,} bytes of source at once. {elsewhere}"


def _existing(folder: Path) -> Path:
    """``folder``, or the nearest above it that exists."""
    return folder if folder.exists() else _existing(folder.parent)
