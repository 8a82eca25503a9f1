"""A loopback Hub for every test, so that none can reach the real one.

``huggingface_hub`` reads its settings when it is first imported, so they are set here, before any test is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxq.machine.blas import load_blas
from tests.hub_server import TOKEN, Hub

# Several test processes share the cores, and a thread of OpenBLAS that waits for another does not give up its own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# As the commands do it, before any test imports mlx: the BLAS of MLX's Linux wheel is fifty times slower.
load_blas()

_SCRATCH = tempfile.TemporaryDirectory(prefix="mlxq-hub-")
_HUB = Hub(Path(_SCRATCH.name)).__enter__()
os.environ.pop("HF_TOKEN", None)
os.environ.update({name: value for name, value in _HUB.env.items() if name != "HF_TOKEN"})


def pytest_unconfigure() -> None:
    _HUB.__exit__()
    _SCRATCH.cleanup()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub, and a token that may write to ``someone/`` and ``org/``."""
    _HUB.folder = tmp_path / "hub"
    _HUB.reset()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return _HUB


@pytest.fixture
def mlxq(hub: Hub) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``mlxq`` in a process of its own, logged in to the Hub; keyword arguments are environment variables."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlxq", *arguments],
            env={**os.environ, **hub.env, **environment},
            capture_output=True,
            text=True,
        )

    return run
