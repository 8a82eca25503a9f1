"""Work in a process of its own, under limits: whatever it runs into stays there.

A model folder is somebody else's: its template may loop for ever, its tokenizer eat memory, its token ids crash a
kernel. ``run_child`` calls one of our functions in a fresh Python, so that the run which asks is never harmed:

- **Time** is the wall clock's, watched by the parent. The child and all it started are one process group, killed whole.
- **Memory** is resident memory, which the parent looks at every ``_LOOK_S``. Limits of the system do not serve:
  ``RLIMIT_AS`` and ``RLIMIT_DATA`` count address space, of which CUDA, Metal and a BLAS reserve many times what they
  use, and macOS enforces neither; ``RLIMIT_RSS`` does nothing on either. On Linux the child also offers itself first
  to the kernel when memory runs out. What a GPU of its own holds is not counted: its allocator fails by itself.
- **Nothing answers for it**: stdin is empty, and its session has no terminal that could be opened to ask. It does not
  reach the Hub, works on what is on this disk, and imports only what its parent would.
- **It does not stay behind**: it ends when its parent does, however that ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlxq.errors import ChildError, MlxqError

# A process fills fresh memory with some 3 GB/s, so it passes its limit by some 150 MB before it is seen.
_LOOK_S = 0.05
# The child's whole program: it imports from where its parent does, and from nowhere else (`-c` and `-m` would put the
# working folder first, which may be a model's).
_PROGRAM = "import sys; sys.path[:] = {path!r}; from mlxq.machine.child import serve; serve()"
_LONGEST = 300


@dataclass(frozen=True)
class Limits:
    """The most wall-clock seconds, and bytes of resident memory, that a child may take."""

    seconds: float
    memory_bytes: int


def run_child(
    function: Callable[[dict[str, Any]], dict[str, Any]], request: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
    """What ``function(request)`` returns, called in a process of its own. Both are JSON; it is a module's function.

    Raises ChildError, in one line without the name of what was done, where it raises, crashes, or passes a limit.
    """
    if not sys.executable:
        raise ChildError("this Python does not say which program it is, so no other could be started")
    with contextlib.ExitStack() as closing:
        try:
            asked, result, said = (closing.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            asked.write(json.dumps(request).encode())
            asked.seek(0)
            # Nothing is ever written to this pipe: the child sees it end when this process does.
            parent_lives, held = os.pipe()
            closing.callback(os.close, held)
            closing.callback(os.close, parent_lives)
            process = _start(f"{function.__module__}:{function.__qualname__}", asked, result, said, parent_lives)
        except OSError as exc:
            raise ChildError(f"no process could be started: {exc.strerror}") from exc
        try:
            _watch(process, limits)
        except BaseException:
            _kill(process)
            raise
        return _result(process.returncode, result, said)


def _start(
    function: str, asked: IO[bytes], result: IO[bytes], said: IO[bytes], parent_lives: int
) -> subprocess.Popen[bytes]:
    path = [os.path.abspath(entry) for entry in sys.path]
    descriptors = (asked.fileno(), result.fileno(), parent_lives)
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM.format(path=path), function, *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        pass_fds=descriptors,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> None:
    """Wait until the child ends. Raises ChildError when it passes a limit."""
    until = time.monotonic() + limits.seconds
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_S)
            return
        if time.monotonic() > until:
            raise ChildError(f"it took over {limits.seconds:.0f} s")
        if _resident_bytes(process.pid) > limits.memory_bytes:
            raise ChildError(f"it took over {limits.memory_bytes / 1e9:.1f} GB of memory")


def _resident_bytes(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        # It has ended since it was last waited for.
        return 0


def _kill(process: subprocess.Popen[bytes]) -> None:
    # macOS refuses (EPERM) to signal a group of which only the dead are left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process inside a call of a driver is gone only when that returns; there is nothing to wait for.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _result(status: int, result: IO[bytes], said: IO[bytes]) -> dict[str, Any]:
    """What the child returned. Raises ChildError with what it said, or with how it ended."""
    result.seek(0)
    written = result.read()
    if status == 0 and written:
        answer = json.loads(written)
        if "error" in answer:
            raise ChildError(answer["error"])
        returned: dict[str, Any] = answer["result"]
        return returned
    how = f"its process ended with exit code {status}"
    if status < 0:
        name = next((known.name for known in signal.Signals if known == -status), f"signal {-status}")
        how = f"its process was ended by {name} ({signal.strsignal(-status)})"
    if -status == signal.SIGKILL:
        how += ", which the system sends when memory runs out"
    said.seek(max(0, said.seek(0, os.SEEK_END) - 8192))
    lines = said.read().decode(errors="replace").strip().splitlines()
    raise ChildError(f"{how}: {one_line(lines[-1])}" if lines else how)


def one_line(text: str) -> str:
    """``text`` in one line of printable characters, and not a long one."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + " ..."


def serve() -> None:
    """The child's side: read what is asked, call the function, write what it returns or why it could not."""
    from mlxq.machine.blas import load_blas

    name, *descriptors = sys.argv[1:]
    asked, result, parent_lives = map(int, descriptors)
    threading.Thread(target=_end_with_parent, args=(parent_lives,), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # Raising it needs no rights, but some containers have no such file to write.
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")
    load_blas()
    module, _, function = name.partition(":")
    with open(asked, encoding="utf-8") as file:
        request = json.load(file)
    try:
        answer = {"result": getattr(importlib.import_module(module), function)(request)}
    except MlxqError as error:
        answer = {"error": one_line(error.message)}
    except Exception as exc:  # Whatever a model's files raise is what the parent is told.
        answer = {"error": one_line(f"{type(exc).__name__}: {exc}")}
    with open(result, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    # All is said; taking libraries and threads down again could only spoil it.
    os._exit(0)


def _end_with_parent(parent_lives: int) -> None:
    """Wait until nobody holds the other end of the pipe, then end with all that this process started."""
    os.read(parent_lives, 1)
    os.killpg(0, signal.SIGKILL)
