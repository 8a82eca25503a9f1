"""Work in a process of its own: it answers, or its failure is one line, and nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxq.errors import BadInputError, ChildError
from mlxq.machine.child import Limits, run_child

ROOMY = Limits(60, 4_000_000_000)


# What the children are asked to do.
def double(request: dict[str, Any]) -> dict[str, Any]:
    sys.stdout.write("not ours to print on")
    return {"doubled": request["text"] * 2}


def look_around(request: dict[str, Any]) -> dict[str, Any]:
    # The first of its session: no terminal belongs to it that could be opened to ask.
    session = os.getsid(0) == os.getpid()
    return {"input": sys.stdin.read(), "session": session, "path": sys.path, "offline": os.environ["HF_HUB_OFFLINE"]}


def answer_on_stdin(request: dict[str, Any]) -> dict[str, Any]:
    return {"answer": input("Run my code? [y/N] ")}


def explain(request: dict[str, Any]) -> dict[str, Any]:
    raise BadInputError("the file\nis \x1b[31mnot\u202e one", "Make it one.")


def fail(request: dict[str, Any]) -> dict[str, Any]:
    raise KeyError("some\nkey" + "x" * 1000)


def crash(request: dict[str, Any]) -> dict[str, Any]:
    sys.stderr.write("first\nthe last words\n")
    sys.stderr.flush()
    os.kill(os.getpid(), request["signal"])
    return {}


def leave(request: dict[str, Any]) -> dict[str, Any]:
    os._exit(request["code"])


def start_another_and_hang(request: dict[str, Any]) -> dict[str, Any]:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(request["file"]).write_text(f"{os.getpid()} {other.pid}")
    while True:
        pass


def eat(request: dict[str, Any]) -> dict[str, Any]:
    held = []
    while True:
        held.append(b"x" * 50_000_000)


def test_it_gives_what_the_function_returns(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_child(double, {"text": "ab\u00e9" * 50_000}, ROOMY) == {"doubled": "ab\u00e9" * 100_000}
    assert capfd.readouterr() == ("", "")


def test_it_has_no_stdin_no_terminal_and_the_parents_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A model's folder, with a file named as a module is.
    (tmp_path / "json.py").write_text("raise SystemExit('code of the working folder ran')")
    monkeypatch.chdir(tmp_path)
    found = run_child(look_around, {}, ROOMY)
    assert (found["input"], found["session"], found["offline"]) == ("", True, "1")
    assert str(tmp_path) not in found["path"]
    with pytest.raises(ChildError, match="EOFError"):
        run_child(answer_on_stdin, {}, ROOMY)


def test_what_it_raises_is_one_printable_line() -> None:
    with pytest.raises(ChildError) as explained:
        run_child(explain, {}, ROOMY)
    assert explained.value.message == "the file is [31mnot one"
    with pytest.raises(ChildError, match=r"^KeyError: 'some\\nkeyx+ \.\.\.$") as failed:
        run_child(fail, {}, ROOMY)
    assert len(failed.value.message) < 320


@pytest.mark.parametrize("killer", [signal.SIGSEGV, signal.SIGABRT, signal.SIGILL])
def test_a_crash_is_named_with_its_last_words(killer: signal.Signals, tmp_path: Path) -> None:
    with pytest.raises(ChildError, match=rf"ended by {killer.name} \(.+\): the last words"):
        run_child(crash, {"signal": killer}, ROOMY)


def test_killed_from_outside_is_said_to_be_about_memory() -> None:
    with pytest.raises(ChildError, match=r"SIGKILL .*, which the system sends when memory runs out"):
        run_child(crash, {"signal": signal.SIGKILL}, ROOMY)


@pytest.mark.parametrize("code", [0, 7])
def test_an_end_without_a_result_is_an_error(code: int) -> None:
    with pytest.raises(ChildError, match=f"ended with exit code {code}"):
        run_child(leave, {"code": code}, ROOMY)


def gone(pid: int) -> bool:
    """Whether a process has ended, within ten seconds; one that nobody waits for may stay listed as a zombie."""
    for _ in range(100):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


def test_past_its_time_it_is_killed_with_all_it_started(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="took over 3 s"):
        run_child(start_another_and_hang, {"file": str(tmp_path / "pids")}, Limits(3, ROOMY.memory_bytes))
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_past_its_memory_it_is_killed() -> None:
    with pytest.raises(ChildError, match=r"took over 0\.6 GB of memory"):
        run_child(eat, {}, Limits(60, 600_000_000))


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_it_does_not_outlive_its_parent(tmp_path: Path, ending: signal.Signals) -> None:
    pids = tmp_path / "pids"
    request = {"file": str(pids)}
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mlxq.machine.child import Limits, run_child\n"
        "from tests.test_child import start_another_and_hang\n"
        f"run_child(start_another_and_hang, {request!r}, Limits(60, 4_000_000_000))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    while not (pids.exists() and pids.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(ending)
    parent.wait(20)
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_where_no_process_can_be_started_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(ChildError, match="does not say which program it is"):
        run_child(double, {"text": ""}, ROOMY)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ChildError, match="no process could be started: No such file"):
        run_child(double, {"text": ""}, ROOMY)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(ChildError, match="no process could be started"):
        run_child(double, {"text": ""}, ROOMY)
