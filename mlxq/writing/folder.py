"""The folder being written: preallocated shards, a journal of finished steps, and the rename that makes it real.

Work goes to ``OUT.partial/model``, beside a journal from which the same command continues where a killed one, or a
machine that lost its power, stopped. The journal is also the lock, and stays until the model has its name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mlxq.errors import MlxqError
from mlxq.files import sync, sync_file, sync_folder
from mlxq.planning.layout import config_text
from mlxq.planning.plan import Plan, Shard
from mlxq.writing.journal import Journal
from mlxq.writing.standing import MODEL, SOURCE, check_output, left_aside, partial_of, replaced_of
from mlxq.writing.trailing import Trailing


@dataclass(frozen=True)
class Found:
    """What a partial folder held: finished step paths, or what was ``discarded``, in words."""

    done: frozenset[str]
    discarded: str | None


class PartialFolder:
    """Opens ``OUT.partial`` for one plan, takes bytes at known places, and turns into ``OUT`` at the end.

    ``place`` is ``OUT.partial``, ``folder`` the model inside it.
    """

    def __init__(self, plan: Plan, out: Path, *, force: bool = False) -> None:
        """Create the folder or take up an interrupted one.

        Raises BadInputError where ``out`` exists and ``force`` is not given, another run writes it now, or the folder
        is somebody else's; MlxqError where the disk has no room for the whole output.
        """
        self.out = out
        self.place = partial_of(out)
        self.folder = self.place / MODEL
        self.plan = plan
        self.force = force
        try:
            check_output(plan.source, out, force=force)
            self._open()
        except OSError as exc:
            raise _explained(exc, self.place) from exc

    @property
    def source_folder(self) -> Path:
        """Where weights of the source may be kept while they are needed."""
        return self.place / SOURCE

    def _open(self) -> None:
        self._journal = Journal(self.place)
        self._descriptors: dict[str, int] = {}
        try:
            # Once more, now that nobody else can make them: another run may have ended in between.
            check_output(self.plan.source, self.out, force=self.force)
            self.found = self._take_up()
            self.done = set(self.found.done)
            self._preallocate()
        except BaseException:
            self._journal.remove_if_new()
            self.close()
            raise
        self._trailing = Trailing(self.plan, self._descriptors, self.done, self._sync)

    def __enter__(self) -> PartialFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if isinstance(exc, OSError):
            raise _explained(exc, self.place) from exc

    def _take_up(self) -> Found:
        """Read the journal; work on another plan, or that a damaged journal spoke of, is discarded."""
        fingerprint = self.plan.fingerprint()
        entries = self._journal.entries
        begun = self.folder.is_dir()
        whole = all(_size(self.folder / shard.file) == shard.nbytes for shard in self.plan.shards)
        goes_on = entries.plan == fingerprint and whole
        if not goes_on:
            for folder in (self.folder, self.source_folder):
                if folder.is_dir():
                    shutil.rmtree(folder)
        self._journal.begin(fingerprint, afresh=not goes_on)
        if goes_on:
            return Found(entries.finished | _on_disk(self.plan, entries.synced), None)
        if not begun or entries.plan == fingerprint:
            return Found(frozenset(), None)
        return Found(
            frozenset(), "a journal that cannot be relied on" if entries.plan is None else "work on another plan"
        )

    def _preallocate(self) -> None:
        """Give every shard its full size and its header now, so that a full disk shows before any work."""
        self.folder.mkdir(exist_ok=True)
        existing = sum(f.stat().st_blocks * 512 for f in self.folder.iterdir())
        free = shutil.disk_usage(self.folder).free
        sidecars = self.plan.source.sidecars.values()
        needed = self.plan.file_bytes + sum(len(s) if isinstance(s, bytes) else s.stat().st_size for s in sidecars)
        if needed > free + existing:
            raise MlxqError(
                f"{self.place} needs {needed:,} bytes, and its disk has {free + existing:,} for it",
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
                        raise disk_full(self.place) from exc
                    os.truncate(descriptor, shard.nbytes)
            else:
                os.truncate(descriptor, shard.nbytes)
            self.write(shard.file, shard.header, 0)
        # Their names first: the journal must not speak of bytes of a file that power loss takes away.
        sync_folder(self.folder)
        sync_folder(self.place)

    def write(self, file: str, data: bytes | memoryview, offset: int) -> None:
        """Write ``data`` at ``offset`` of a shard. Safe from several threads."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptors[file], view[done : done + (1 << 30)], offset + done)
        except OSError as exc:
            raise _explained(exc, self.place) from exc

    def finished(self, path: str) -> None:
        """Note in the journal that every byte of a step is written. Raises MlxqError where the disk lost some."""
        self._journal.note(step=path)
        self.done.add(path)
        self._trailing.finished(path)

    def shard_sha256(self) -> dict[str, str]:
        """SHA-256 of each shard as read back from its file, by name, once every step is finished."""
        return self._trailing.sha256()

    def _sync(self, file: str, upto: int) -> None:
        """Bring what is written of a shard to the disk; it is whole from its start to byte ``upto``."""
        try:
            sync(self._descriptors[file])
        except OSError as exc:
            # The system says so once, and not what is lost: nothing that the journal holds can be relied on.
            self._journal.forget()
            raise MlxqError(
                f"the disk did not take what was written to {self.folder / file}: {exc.strerror}",
                "See that it has room and works; the same command then starts afresh.",
            ) from exc
        self._journal.note(synced=file, bytes=upto)
        self._journal.sync()

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
        """Bring everything to the disk and give it the name ``out``; an older ``out`` goes only once the new stands.

        The lock is kept to the end. Raises BadInputError where ``out`` is no longer what it was at the start.
        """
        for shard in self.plan.shards:
            self._sync(shard.file, shard.nbytes)
        self._let_go()
        _sync_small_files(self.folder, {shard.file for shard in self.plan.shards})
        sync_folder(self.place)
        check_output(self.plan.source, self.out, force=self.force)
        old = self._put_aside()
        self.folder.rename(self.out)
        # Where it went first: a file system may bring the two to the disk apart.
        sync_folder(self.out.parent)
        sync_folder(self.place)
        if old is not None:
            shutil.rmtree(old)
        if self.source_folder.is_dir():
            shutil.rmtree(self.source_folder)
        self._journal.remove()

    def _put_aside(self) -> Path | None:
        """Rename what stands at ``out``; returns what is to be removed once the new model stands there."""
        old, left = replaced_of(self.out), left_aside(self.out)
        if not self.out.exists():
            return old if left else None
        if left:
            shutil.rmtree(old)
        self._journal.note(replacing=True)
        self._journal.sync()
        self.out.rename(old)
        sync_folder(self.out.parent)
        return old

    def _let_go(self) -> None:
        """Stop what reads the shards, and close them."""
        if hasattr(self, "_trailing"):
            self._trailing.stop()
        for descriptor in self._descriptors.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._descriptors = {}

    def close(self) -> None:
        """Let go of files and the lock; the folder stays as it is."""
        self._let_go()
        self._journal.close()


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


def _on_disk(plan: Plan, synced: Mapping[str, int]) -> frozenset[str]:
    """Steps whose every byte lies in what is on the disk for certain: so many bytes from the start of each shard."""
    there = {
        spec_name
        for shard in plan.shards
        for spec_name, end in _ends(shard).items()
        if end <= synced.get(shard.file, 0)
    }
    return frozenset(step.path for step in plan.steps if all(spec.name in there for spec in step.outputs))


def _ends(shard: Shard) -> dict[str, int]:
    """Where the bytes of each tensor of a shard end: where those of the next begin."""
    names = sorted(shard.offsets, key=lambda name: shard.offsets[name])
    return dict(zip(names, [*(shard.offsets[name] for name in names[1:]), shard.nbytes], strict=True))


def _size(file: Path) -> int | None:
    """Bytes of a file, None where it is none."""
    return file.stat().st_size if file.is_file() and not file.is_symlink() else None


def _sync_small_files(folder: Path, shards: Collection[str]) -> None:
    """Bring all of a model to the disk but its ``shards``, which are there: files, and the folders' names of them."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if name not in shards:
                sync_file(Path(place, name))
        sync_folder(Path(place))
