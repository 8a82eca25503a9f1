"""Where MLX is not: Windows and Intel Macs, or a Linux without its backend. A process of its own plays each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import llama

# What lies outside mlxq is imported first, on the system that this really is: it looks at the system as well.
PROGRAM = """
import asyncio, multiprocessing, platform, sys, sysconfig
import huggingface_hub, psutil, pydantic, rich.progress, typer.main, yaml
huggingface_hub.get_token, sysconfig.get_config_vars()

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {missing!r} or name.partition(".")[0] == "mlx":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for name in {missing!r}:
    sys.modules.pop(name, None)
sys.platform = {platform!r}
platform.system = lambda: {system!r}
platform.machine = lambda: {processor!r}
sys.argv = ["mlxq", *{arguments!r}]
from mlxq.__main__ import main
main()
"""
WINDOWS = {"platform": "win32", "system": "Windows", "processor": "AMD64", "missing": ("fcntl", "resource", "pwd")}
INTEL_MAC = {"platform": "darwin", "system": "Darwin", "processor": "x86_64", "missing": ()}
M_MAC = {"platform": "darwin", "system": "Darwin", "processor": "arm64", "missing": ()}
LINUX = {"platform": "linux", "system": "Linux", "processor": "x86_64", "missing": ()}
ELSEWHERE = "hint: It needs a Mac with Apple silicon, or Linux (on Windows: WSL). mlxq inspect works without it."


def mlxq_on(machine: dict[str, object], *arguments: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(**machine, arguments=arguments)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(llama(tmp_path_factory.mktemp("models") / "model"))


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (WINDOWS, ["error: MLX does not run on Windows AMD64", ELSEWHERE]),
        (INTEL_MAC, ["error: MLX does not run on macOS x86_64", ELSEWHERE]),
        (M_MAC, ["error: MLX does not load: No module named 'mlx'", "hint: Install it: pip install --upgrade mlx."]),
        (
            LINUX,
            [
                "error: MLX does not load: No module named 'mlx'",
                "hint: Install it with a backend: pip install 'mlx[cpu]', or 'mlx[cuda13]' for an NVIDIA GPU.",
            ],
        ),
    ],
    ids=["windows", "intel-mac", "mac", "linux"],
)
def test_without_mlx_a_command_says_what_it_needs(machine: dict[str, object], said: list[str], model: str) -> None:
    done = mlxq_on(machine, "quantize", "4bit", "--model", model, "--dry-run")
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", said)


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "MODEL"),
        ("compare", "MODEL", "4bit"),
        ("upload", "MODEL", "org/name"),
        ("inspect", "MODEL", "--recipe", "4bit"),
        ("recipes", "check", "4bit", "--model", "MODEL"),
        ("quantize", "--locked", "MODEL/mlxq.json"),
    ],
    ids=" ".join,
)
def test_every_command_that_needs_mlx_passes_the_door(arguments: tuple[str, ...], model: str, tmp_path: Path) -> None:
    done = mlxq_on(WINDOWS, *(argument.replace("MODEL", model) for argument in arguments))
    assert (done.returncode, done.stderr.splitlines()) == (2, ["error: MLX does not run on Windows AMD64", ELSEWHERE])


@pytest.mark.parametrize("machine", [WINDOWS, INTEL_MAC], ids=["windows", "intel-mac"])
def test_what_needs_no_mlx_works_without(machine: dict[str, object], model: str) -> None:
    done = mlxq_on(machine, "inspect", model, "--device", "m4-max-64gb")
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    assert "(llama), 2 layers" in done.stdout
    assert mlxq_on(machine, "recipes", "check", "4bit").returncode == 0
    shown = mlxq_on(machine, "env")
    assert shown.returncode == 0
    assert "MLX does not run on" in shown.stdout
