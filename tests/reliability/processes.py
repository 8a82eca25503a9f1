"""Commands in processes that can be killed: each a fork of one that has imported most, so that hundreds are cheap.

Import this module before anything that imports ``huggingface_hub``: its settings are read once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.hub_server import Hub

LOOK_EVERY_S = 0.005
# A command that takes longer than this hangs.
LIMIT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-9 where it was killed), and what it wrote to stderr."""

    code: int
    said: str
    seconds: float

    @property
    def one_line(self) -> bool:
        """Whether a failure was said as it should be: no traceback, and no more than what is wrong and what to do."""
        return "Traceback" not in self.said and 1 <= len(self.said.strip().splitlines()) <= 3


@contextlib.contextmanager
def prepared() -> Iterator[tuple[Path, Hub]]:
    """A folder to work in and a Hub on loopback, with all imported that commands import but MLX.

    MLX starts threads when it is first used, and a fork has none of them.
    """
    with tempfile.TemporaryDirectory(prefix="mlxq-campaign-") as folder, Hub(Path(folder, "hub")) as hub:
        os.environ.update(hub.env, NO_COLOR="1", COLUMNS="200", OPENBLAS_NUM_THREADS="1")
        import huggingface_hub  # noqa: F401
        import transformers  # noqa: F401
        from transformers import PreTrainedTokenizerFast  # noqa: F401

        import mlxq.cli  # noqa: F401

        yield Path(folder), hub


def build_model(folder: Path, layers: int) -> None:
    """A small Llama checkpoint in two files, made in a process of its own."""
    process = os.fork()
    if process == 0:
        code = 99
        try:
            from tests.checkpoints import llama

            llama(folder, shards=2, num_hidden_layers=layers)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(process, 0)[1] == 0


def start(arguments: list[str], place: Path, log: Path, environment: Mapping[str, str]) -> int:
    """Start ``mlxq`` with these arguments in a folder; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _become(arguments, place, log, environment)
    return process


def wait(process: int, log: Path, *, kill_after_s: float = LIMIT_S) -> Ended:
    """Wait for the end of a command, or kill it."""
    began = time.monotonic()
    while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() - began > kill_after_s:
            os.kill(process, signal.SIGKILL)
            found = os.waitpid(process, 0)
            break
        time.sleep(LOOK_EVERY_S)
    return Ended(os.waitstatus_to_exitcode(found[1]), log.read_text(errors="replace"), time.monotonic() - began)


def command(arguments: list[str], place: Path, *, kill_after_s: float = LIMIT_S, **environment: str) -> Ended:
    """Run ``mlxq`` to its end, or kill it after so many seconds."""
    log = place / "log"
    return wait(start(arguments, place, log, environment), log, kill_after_s=kill_after_s)


def _become(arguments: list[str], place: Path, log: Path, environment: Mapping[str, str]) -> NoReturn:
    """In a fork: be that command, and end with it."""
    code = 99
    try:
        os.environ.update(environment)
        os.chdir(place)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(written, 2)
        sys.argv = ["mlxq", *arguments]
        from mlxq.__main__ import main

        main()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1 if exc.code else 0
    finally:
        sys.stderr.flush()
        os._exit(code)
