"""Behind those who write: each shard is read back in the order of its bytes, hashed, and brought to the disk.

Done at the end, both would be waited for: one core hashes while the others idle, and a system that keeps gigabytes
in memory before it writes any has all of them still to write.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future

from mlxq.planning.plan import Plan, Shard

# Bytes read back at a time, and how many of them are hashed before they are brought to the disk.
READ_BYTES = 1 << 20
SYNC_BYTES = 128 << 20


class Trailing:
    """One thread that follows the finished steps of a plan through its shards."""

    def __init__(
        self, plan: Plan, descriptors: Mapping[str, int], done: Iterable[str], sync: Callable[[str, int], None]
    ) -> None:
        """Start with the steps that are ``done``.

        ``sync`` brings a shard, named by its file, to the disk; it is told up to which byte the shard is whole.
        """
        self._step_of = {spec.name: (step.path, spec.nbytes) for step in plan.steps for spec in step.outputs}
        self._descriptors = descriptors
        self._sync = sync
        self._done = set(done)
        self._stopped = False
        self._changed = threading.Condition()
        self._digests: Future[dict[str, str]] = Future()
        # A daemon: it waits for others, and a program that ends must not wait for it.
        self._thread = threading.Thread(target=self._run, args=[plan.shards], name="mlxq-trailing", daemon=True)
        self._thread.start()

    def finished(self, path: str) -> None:
        """Every byte of a step is written. Raises what reading back or the disk has raised so far."""
        with self._changed:
            self._done.add(path)
            self._changed.notify()
        if self._digests.done():
            self._digests.result()

    def sha256(self) -> dict[str, str]:
        """SHA-256 of each shard in hex, by its file's name, once every step is finished. Raises what went wrong."""
        return self._digests.result()

    def stop(self) -> None:
        """End the thread; it has let go of the descriptors when this returns."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self, shards: Iterable[Shard]) -> None:
        try:
            self._digests.set_result({shard.file: self._follow(shard) for shard in shards})
        except BaseException as exc:
            self._digests.set_exception(exc)

    def _follow(self, shard: Shard) -> str:
        """Hash a shard as its steps finish, from its first byte to its last."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(READ_BYTES))
        position = synced = 0
        for end in self._written(shard):
            while position < end and not self._stopped:
                count = os.preadv(self._descriptors[shard.file], [buffer[: end - position]], position)
                if count == 0:
                    raise OSError(None, "it became shorter while it was written", shard.file)
                digest.update(buffer[:count])
                position += count
                if position - synced >= SYNC_BYTES or position == shard.nbytes:
                    self._sync(shard.file, position)
                    synced = position
        return digest.hexdigest()

    def _written(self, shard: Shard) -> Iterator[int]:
        """How far from its start a shard is whole: the end of its header, then of each tensor when it is finished."""
        yield len(shard.header)
        for name, offset in sorted(shard.offsets.items(), key=lambda item: item[1]):
            path, nbytes = self._step_of[name]
            with self._changed:
                while path not in self._done and not self._stopped:
                    self._changed.wait()
            yield offset + nbytes
