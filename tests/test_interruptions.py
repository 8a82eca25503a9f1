"""A disk that fills up and Ctrl-C at a terminal: said in one line, and the same command ends in the same bytes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlx.utils import tree_flatten

from mlxq.errors import MlxqError
from mlxq.headers import encode_header
from mlxq.pipeline import Finished, Resumed, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import load_recipe
from mlxq.sources.resolve import resolve
from mlxq.tensors import TensorSpec
from mlxq.writing.execute import Written
from tests.checkpoints import LLAMA, save
from tests.terminal import CTRL_C, at_a_terminal
from tests.test_execute import hashes


def small_disk(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system of ``nbytes`` mounted at ``folder``; skips where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield folder
    finally:
        # Lazily: a failed test may still have files open there.
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 48 MiB."""
    yield from small_disk(tmp_path / "disk", 48 << 20)


def empty_model(folder: Path, layers: int) -> Path:
    """A large checkpoint of zeros that takes no room on the disk."""
    import mlx_lm.utils

    config: dict[str, Any] = {
        **LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers,
    }  # fmt: skip
    save(folder, config, {})
    model_class, args_class = mlx_lm.utils._get_classes(config)
    shapes = tree_flatten(model_class(args_class.from_dict(config)).parameters())
    specs = [TensorSpec(name, "BF16", tuple(array.shape)) for name, array in shapes]
    header = encode_header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        os.truncate(file.fileno(), len(header) + sum(spec.nbytes for spec in specs))
    return folder


def plan_of(model: Path) -> Plan:
    return prepare(load_recipe("8bit"), resolve(str(model)))


def fill(disk: Path, leave: int) -> Path:
    """Take all of ``disk`` but ``leave`` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):  # no room is left
            while True:
                file.write(bytes(1 << 16))
        file.truncate(file.tell() - leave)
    return filler


def finish(plan: Plan, out: Path) -> tuple[Resumed | None, Finished]:
    first, *_, last = run(plan, out)
    assert isinstance(last, Finished)
    return first if isinstance(first, Resumed) else None, last


def test_a_disk_too_small_is_said_before_any_work(tmp_path: Path, disk: Path) -> None:
    plan = plan_of(empty_model(tmp_path / "model", layers=2))
    filler = fill(disk, plan.file_bytes // 2)
    with pytest.raises(MlxqError, match=r"needs [\d,]+ bytes") as caught:
        next(run(plan, disk / "out"))
    assert str(disk / "out.partial") in caught.value.message
    filler.unlink()
    finish(plan, disk / "out")


def test_a_disk_that_fills_while_tensors_are_written(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(empty_model(tmp_path / "model", layers=2))
    finish(plan, tmp_path / "whole")
    # As on macOS, and on file systems that cannot reserve space.
    monkeypatch.delattr(os, "posix_fallocate")
    events = run(plan, disk / "out")
    next(event for event in events if isinstance(event, Written))
    filler = fill(disk, 0)
    with pytest.raises(MlxqError, match="the disk is full") as caught:
        list(events)
    assert str(disk / "out.partial") in caught.value.message
    assert "same command again" in str(caught.value.hint)
    assert not (disk / "out").exists()
    filler.unlink()
    finish(plan, disk / "out")
    assert hashes(disk / "out") == hashes(tmp_path / "whole")


def test_a_disk_that_fills_before_the_small_files(tmp_path: Path, disk: Path) -> None:
    plan = plan_of(empty_model(tmp_path / "model", layers=2))
    finish(plan, tmp_path / "whole")
    events = run(plan, disk / "out")
    next(event for event in events if isinstance(event, Written) and event.written_bytes == event.total_bytes)
    filler = fill(disk, 0)
    with pytest.raises(MlxqError, match="the disk is full") as caught:
        list(events)
    assert str(disk / "out.partial") in caught.value.message
    assert not (disk / "out").exists()
    filler.unlink()
    resumed, _ = finish(plan, disk / "out")
    assert resumed is not None
    assert resumed.step_count
    assert hashes(disk / "out") == hashes(tmp_path / "whole")


def test_ctrl_c_at_a_terminal_stops_in_one_line_and_the_same_command_continues(tmp_path: Path) -> None:
    empty_model(tmp_path / "model", layers=12)
    command = [sys.executable, "-m", "mlxq", "quantize", "8bit", "--model", "model", "-o", "out", "--no-generate"]
    journal = tmp_path / "out.partial" / "journal.jsonl"
    stopped = at_a_terminal(
        command, tmp_path, press=CTRL_C, when=lambda: journal.is_file() and journal.read_bytes().count(b"\n") > 3
    )
    assert stopped.exit_code == 130
    assert not (tmp_path / "out").exists()
    said = [line for line in stopped.screen.splitlines() if "stopped" in line]
    assert len(said) == 1
    assert "out.partial" in said[0]
    assert "same command continues" in said[0]
    assert stopped.screen.rstrip().endswith(said[0].strip()), "nothing comes after it"
    assert "Traceback" not in stopped.screen
    environment = {**os.environ, "NO_COLOR": "1"}
    again = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, env=environment)
    assert "continuing out.partial" in again.stderr
    subprocess.run([*command[:-3], "-o", "whole", "--no-generate"], cwd=tmp_path, check=True, capture_output=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_ctrl_c_while_the_program_is_still_imported_is_quiet() -> None:
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlxq.cli.compare":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from mlxq.__main__ import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 130
    assert run.stdout + run.stderr == ""
