"""What the machine is. What must happen before ``mlx.core`` is imported runs in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from mlxq.machine.blas import load_blas
from mlxq.machine.runtime import environment, free_memory_bytes, peak_rss_bytes

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels carry a reference BLAS")


def run(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@linux_only
def test_too_late_is_said_and_changes_nothing() -> None:
    found = run(
        "import json\n"
        "import mlx.core\n"
        "from mlxq.machine.blas import load_blas\n"
        "info = load_blas()\n"
        "print(json.dumps([info.path, info.note]))"
    )
    assert found[0] is None
    assert found[1]


def test_on_a_mac_there_is_nothing_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    info = load_blas()
    assert (info.name, info.path) == ("Accelerate", None)


def test_environment_names_versions_and_never_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    found = environment()
    assert {"mlxq", "mlx", "mlx-lm", "python"} <= found.versions.keys()
    assert found.hub_login is True
    assert "hf_secret" not in repr(found)
    assert 0 < found.free_memory_bytes <= found.memory_bytes
    assert found.device in ("cpu", "gpu")


def test_peak_memory_is_in_bytes_and_grows() -> None:
    before = peak_rss_bytes()
    held = bytearray(b"x" * (200 << 20))
    grown = peak_rss_bytes()
    assert len(held) == 200 << 20
    assert grown >= 200 << 20
    assert before <= grown < free_memory_bytes() + grown + (64 << 30)


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    ballast = bytearray(400 << 20)
    code = "from mlxq.machine.runtime import peak_rss_bytes; print(peak_rss_bytes())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < len(ballast)
