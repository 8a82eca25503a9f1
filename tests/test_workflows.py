"""The reusable workflow: its own steps, run by bash as the runner would, against a Hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoints import llama
from tests.documents import ROOT, blocks
from tests.hub_server import Hub

FILE = ROOT / ".github" / "workflows" / "quantize.yml"


def workflow() -> dict[Any, Any]:
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def run_step(name: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    (step,) = [s for s in workflow()["jobs"]["quantize"]["steps"] if s.get("name") == name]
    # What `shell: bash` means on a runner.
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """What the runner sets for each step, and ``mlxq`` on the path."""
    program = tmp_path / "bin" / "mlxq"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlxq "$@"\n')
    program.chmod(0o755)
    llama(tmp_path / "original", hidden_size=64, num_hidden_layers=1)
    return {
        **os.environ,
        **hub.env,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(FILE.parents[2]), os.environ.get("PYTHONPATH", "")]),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
        "MODEL": "original",
        "RECIPE": "4bit",
        "REPO": "org/made",
        "GATES": "kl_mean<5 size_bytes<1GB",
    }


def test_its_steps_end_in_a_published_model(hub: Hub, tmp_path: Path, env: dict[str, str]) -> None:
    for name in ("Plan", "Quantize", "Compare", "Publish"):
        done = run_step(name, tmp_path, env)
        assert done.returncode == 0, done.stderr
    assert hub.files("org/made")["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "## What it cost" in hub.files("org/made")["README.md"].decode()
    summary = (tmp_path / "summary.md").read_text()
    assert "## Plan" in summary
    assert "Gate passed: out: kl_mean" in summary
    assert f"Published: {hub.url}/org/made" in summary


def test_a_failed_gate_ends_the_job_with_its_own_exit_code(tmp_path: Path, env: dict[str, str]) -> None:
    env |= {"GATES": "kl_mean<1e-12"}
    assert run_step("Quantize", tmp_path, env).returncode == 0
    assert run_step("Compare", tmp_path, env).returncode == 3
    assert run_step("Plan", tmp_path, {**env, "RECIPE": "4bti"}).returncode == 2


def test_the_documented_caller_asks_for_what_there_is() -> None:
    (caller,) = (yaml.safe_load(b.text) for b in blocks(ROOT / "docs" / "ci.md") if b.language == "yaml")
    (job,) = caller["jobs"].values()
    offered = workflow()[True]["workflow_call"]
    assert job["uses"].endswith(f"{FILE.relative_to(ROOT)}@main")
    needed = {name for name, asked in offered["inputs"].items() if asked.get("required")}
    assert needed <= job["with"].keys() <= offered["inputs"].keys()
    assert job["secrets"].keys() == offered["secrets"].keys()


def test_it_asks_the_same_of_a_person_and_of_a_workflow() -> None:
    # YAML 1.1 reads the key `on` as true.
    asked = workflow()[True]
    assert asked["workflow_dispatch"]["inputs"] == asked["workflow_call"]["inputs"]
    assert set(asked["workflow_call"]["secrets"]) == {"HF_TOKEN"}
