"""Fetching the files of a Hub model through ``huggingface_hub``: several at a time, with progress and patience."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxq.errors import MlxqError
from mlxq.retry import Waiting, patiently
from mlxq.sources.base import ModelSource
from mlxq.sources.hub import add_companions, opened, remember_revision
from mlxq.sources.hub_errors import explained
from mlxq.sources.hub_files import counting_bar
from mlxq.sources.remote import HubModel, Reference, RemoteFile

_AT_ONCE = 4
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class Downloading:
    """Bytes that are here, of all to fetch; ``file`` is the one being fetched, where it is one."""

    done_bytes: int
    total_bytes: int
    file: str | None = None


class _StoppedError(Exception):
    """Raised inside a download that is no longer wanted."""


class Transfer:
    """Files on their way, in threads of their own, into the cache or into a folder.

    The threads are daemons: an interrupted program does not wait for them. ``stop`` ends them at the next piece.
    """

    def __init__(self, remote: HubModel, files: Sequence[RemoteFile], into: Path | None = None) -> None:
        self.remote = remote
        self.files = tuple(files)
        self.into = into
        self.paths: dict[str, Path] = {}
        self._arrived = {file.name: 0 for file in files}
        self._stop = threading.Event()
        self._waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Waiting | Exception | None] = queue.SimpleQueue()
        for file in files:
            self._waiting.put(file)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(_AT_ONCE, len(files)))]
        for thread in self._threads:
            thread.start()

    def wait(self) -> Generator[Downloading | Waiting, None, dict[str, Path]]:
        """Yield progress until everything is here; returns where each file is. Raises what went wrong."""
        running = len(self._threads)
        total = sum(file.nbytes for file in self.files)
        name = self.files[0].name if len(self.files) == 1 else None
        try:
            while running:
                try:
                    event = self._events.get(timeout=_LOOK_EVERY_S)
                except queue.Empty:
                    yield Downloading(min(total, sum(self._arrived.values())), total, name)
                    continue
                if event is None:
                    running -= 1
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
        except BaseException:
            self.stop()
            raise
        yield Downloading(total, total, name)
        return self.paths

    def stop(self) -> None:
        """Let go of what is not here yet."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=1)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    file = self._waiting.get_nowait()
                except queue.Empty:
                    break
                reference = Reference(self.remote.repo, None, self.remote.commit)
                for event in self._fetch(file, reference):
                    self._events.put(event)
            self._events.put(None)
        except _StoppedError:
            self._events.put(None)
        except Exception as exc:
            self._events.put(exc)

    def _fetch(self, file: RemoteFile, reference: Reference) -> Generator[Waiting, None, None]:
        path = yield from patiently(lambda: self._download(file), lambda exc: explained(exc, reference))
        self.paths[file.name] = path
        self._arrived[file.name] = file.nbytes

    def _download(self, file: RemoteFile) -> Path:
        from huggingface_hub import hf_hub_download

        def count(nbytes: int) -> None:
            if self._stop.is_set():
                raise _StoppedError
            self._arrived[file.name] += nbytes

        self._arrived[file.name] = 0
        bar = counting_bar(count)
        try:
            found = hf_hub_download(
                self.remote.repo, file.name, revision=self.remote.commit, tqdm_class=bar, local_dir=self.into
            )
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                raise MlxqError(
                    f"the disk is full; {file.name} of {self.remote.repo} did not fit on it",
                    "Free some space and run the same command again: files that are complete are kept.",
                ) from exc
            raise
        return Path(found)


def fetch(source: ModelSource) -> Generator[Downloading | Waiting, None, ModelSource]:
    """The same source with its files here, in the cache of ``huggingface_hub``.

    Raises MlxqError where that fails; files that are complete stay, and the same call continues with the others.
    """
    remote = source.remote
    if remote is None:
        return source
    paths = yield from Transfer(remote, (*remote.weights, *remote.companions)).wait()
    remember_revision(remote)
    local = opened(remote, source.name, paths)
    if dict(local.tensors) != dict(source.tensors):
        raise MlxqError(f"{source.name}: the files fetched are not those whose headers were read")
    return local


def fetch_companions(source: ModelSource) -> Generator[Downloading | Waiting, None, ModelSource]:
    """The same source with everything here but its weights, which remain headers."""
    remote = source.remote
    if remote is not None and remote.companions:
        add_companions(remote, (yield from Transfer(remote, remote.companions).wait()))
    return source
