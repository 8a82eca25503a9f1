"""The folder being written: preallocated shards, a journal of finished steps, and the rename that makes it real.

Work goes to ``OUT.partial``. Its journal's first line names the plan by fingerprint, every further line one finished
step, so that the same command continues where a killed one stopped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mlxq.errors import BadInputError, MlxqError
from mlxq.planning.layout import config_text
from mlxq.planning.plan import Plan
from mlxq.writing.trailing import Trailing

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Found:
    """What a partial folder held: finished step paths, and whether older work on another plan was discarded."""

    done: frozenset[str]
    discarded: bool


class PartialFolder:
    """Opens ``OUT.partial`` for one plan, takes bytes at known places, and turns into ``OUT`` at the end."""

    def __init__(self, plan: Plan, out: Path, *, force: bool = False) -> None:
        """Create the folder or take up an interrupted one.

        Raises BadInputError where ``out`` exists and ``force`` is not given, or another run writes it now;
        MlxqError where the disk has no room for the whole output.
        """
        if out.exists() and not force:
            raise BadInputError(f"{out} already exists", "Choose another -o, or replace it with --force.")
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.plan = plan
        try:
            self._open()
        except OSError as exc:
            raise _explained(exc, self.folder) from exc

    @property
    def source_folder(self) -> Path:
        """Where weights of the source may be kept while they are needed."""
        return self.folder / "source"

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            self._lock.close()
            raise BadInputError(
                f"another run is writing {self.folder} right now", "Wait for it, or choose another -o."
            ) from exc
        self._descriptors: dict[str, int] = {}
        try:
            self.found = self._take_up()
            self.done = set(self.found.done)
            self._preallocate()
        except BaseException:
            self.close()
            raise
        self._journal = (self.folder / JOURNAL).open("a", encoding="utf-8")
        self._trailing = Trailing(self.plan, self._descriptors, self.done, self._sync)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(exc, OSError):
            raise _explained(exc, self.folder) from exc

    def _take_up(self) -> Found:
        """Read the journal; work on another plan is discarded."""
        fingerprint = self.plan.fingerprint()
        journal = self.folder / JOURNAL
        lines = list(_whole_lines(journal)) if journal.is_file() else []
        if lines and lines[0].get("plan") == fingerprint:
            return Found(frozenset(str(line["step"]) for line in lines[1:]), discarded=False)
        for file in self.folder.iterdir():
            if file.name != "lock":
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        journal.write_text(json.dumps({"plan": fingerprint}) + "\n", encoding="utf-8")
        return Found(frozenset(), discarded=bool(lines))

    def _preallocate(self) -> None:
        """Give every shard its full size and its header now, so that a full disk shows before any work."""
        existing = sum(f.stat().st_blocks * 512 for f in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        sidecars = self.plan.source.sidecars.values()
        needed = self.plan.file_bytes + sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in sidecars)
        if needed > free + existing:
            raise MlxqError(
                f"{self.folder} needs {needed:,} bytes, and its disk has {free + existing:,} for it",
                "Free some space, or choose another -o; what is already written is kept.",
            )
        for shard in self.plan.shards:
            descriptor = os.open(self.folder / shard.file, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors[shard.file] = descriptor
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(descriptor, 0, shard.nbytes)
                except OSError as exc:
                    if exc.errno == errno.ENOSPC:
                        raise disk_full(self.folder) from exc
                    os.truncate(descriptor, shard.nbytes)
            else:
                os.truncate(descriptor, shard.nbytes)
            self.write(shard.file, shard.header, 0)

    def write(self, file: str, data: bytes | memoryview, offset: int) -> None:
        """Write ``data`` at ``offset`` of a shard. Safe from several threads."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptors[file], view[done : done + (1 << 30)], offset + done)
        except OSError as exc:
            raise _explained(exc, self.folder) from exc

    def finished(self, path: str) -> None:
        """Note in the journal that every byte of a step is written. Raises MlxqError where the disk lost some."""
        self._journal.write(json.dumps({"step": path}) + "\n")
        self._journal.flush()
        self.done.add(path)
        self._trailing.finished(path)

    def shard_sha256(self) -> dict[str, str]:
        """SHA-256 of each shard as read back from its file, by name, once every step is finished."""
        return self._trailing.sha256()

    def _sync(self, file: str) -> None:
        """Bring what is written of a shard to the disk."""
        try:
            os.fsync(self._descriptors[file])
        except OSError as exc:
            # The system says so once, and not what is lost: nothing that the journal holds can be relied on.
            (self.folder / JOURNAL).unlink(missing_ok=True)
            raise MlxqError(
                f"the disk did not take what was written to {self.folder / file}: {exc.strerror}",
                "See that it has room and works; the same command then starts afresh.",
            ) from exc

    def write_sidecars(self) -> None:
        """Write config, index and byte copies of the source's tokenizer and other companions."""
        plan = self.plan
        (self.folder / "config.json").write_text(config_text(plan.config), encoding="utf-8")
        weight_map = {name: shard.file for shard in plan.shards for name in shard.offsets}
        index = {
            "metadata": {"total_size": plan.weight_bytes, "total_parameters": plan.parameter_count},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")
        for name, content in plan.source.sidecars.items():
            file = self.folder / name
            file.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                file.write_bytes(content)
            else:
                shutil.copyfile(content, file)

    def publish(self) -> None:
        """Flush to disk and rename to ``out``; an older ``out`` is removed only after the new one stands."""
        for file in self._descriptors:
            self._sync(file)
        self.close()
        for name in (JOURNAL, "lock"):
            (self.folder / name).unlink()
        shutil.rmtree(self.source_folder, ignore_errors=True)
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".replaced")
            if old.exists():
                _remove(old)
            self.out.rename(old)
            self.folder.rename(self.out)
            _remove(old)
        else:
            self.folder.rename(self.out)

    def close(self) -> None:
        """Let go of files and the lock; the folder stays as it is."""
        if hasattr(self, "_trailing"):
            self._trailing.stop()
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors = {}
        if hasattr(self, "_journal"):
            self._journal.close()
        self._lock.close()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def disk_full(folder: Path) -> MlxqError:
    """The error for a disk that filled up while writing."""
    return MlxqError(
        f"the disk is full; what is finished stays in {folder}",
        "Free some space and run the same command again: it continues from there.",
    )


def _explained(exc: OSError, folder: Path) -> MlxqError:
    """What the system refused, as an error that names the place."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(folder)
    return MlxqError(f"cannot write {exc.filename or folder}: {exc.strerror or exc}")


def _whole_lines(journal: Path) -> Iterator[Mapping[str, Any]]:
    """The journal's complete lines; a line cut off by a crash ends it."""
    for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return
