"""What a newcomer is told to install is what the project has, and ``.ci/run`` sees what pip does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli
import yaml

from tests.documents import DOCUMENTS, ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# '.[cpu,dev]', mlxq[cuda], and in words: the extra `cpu`, the `dev` extra.
NAMED = re.compile(r"""(?:['"]\.|\bmlxq|extra="?)\[([a-z][\w,]*)\]|\bextras? `(\w+)`|`(\w+)` extra\b""")


def pyproject() -> dict[str, Any]:
    return tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def project() -> dict[str, Any]:
    return dict(pyproject()["project"])


def test_every_extra_that_is_named_exists_and_every_one_is_named() -> None:
    named = set()
    for file in (*DOCUMENTS, *WORKFLOWS, ROOT / ".ci" / "run", *(ROOT / "mlxq").rglob("*.py")):
        for groups in NAMED.findall(file.read_text(encoding="utf-8")):
            extras = set(",".join(filter(None, groups)).split(","))
            assert extras <= project()["optional-dependencies"].keys(), f"{file.relative_to(ROOT)} names {extras}"
            named |= extras
    assert named == project()["optional-dependencies"].keys()


def test_the_oldest_python_is_the_one_that_is_tested() -> None:
    oldest = project()["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    assert {oldest, "3.12", "3.13"} == set(tested)


def makefile() -> str:
    return (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_target_that_is_named_exists_and_contributing_names_them_all() -> None:
    targets = set(re.findall(r"^(\w+):", makefile(), re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile(), re.MULTILINE)
    assert targets == set(phony.split())
    contributing = ROOT / "CONTRIBUTING.md"
    for file in (*DOCUMENTS, contributing, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"):
        named = set(re.findall(r"`make (\w+)", file.read_text(encoding="utf-8")))
        assert named <= targets, f"{file.relative_to(ROOT)} names {named - targets}"
    assert set(re.findall(r"`make (\w+)", contributing.read_text(encoding="utf-8"))) == targets


def test_what_make_runs_is_there() -> None:
    (long,) = re.findall(r"^LONG := (.*(?:\\\n.*)*)$", makefile(), re.MULTILINE)
    for name in long.replace("\\", "").split():
        assert (ROOT / "tests" / f"test_{name}.py").is_file(), name
    for module in re.findall(r"python -m ([\w.]+)", makefile()):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module
    markers = {marker.partition(":")[0] for marker in pyproject()["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"-m (?:\"not )?(\w+)\"?$", makefile(), re.MULTILINE)) <= markers


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/design.md"])
def test_files_that_are_pointed_at_are_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for path in re.findall(r"`((?:mlxq|tests|docs|recipes)/[\w/.]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    for test in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {test}(" in file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("*.py")), test


# What pip says and writes: https://pip.pypa.io/en/stable/reference/installation-report/
WHEEL = {"metadata": {"name": "click"}, "download_info": {"url": "https://x/click-8-py3-none-any.whl"}}
OURS = {"metadata": {"name": "mlxq"}, "download_info": {"url": "file:///home/me/mlxq", "dir_info": {}}}
ARCHIVE = {"metadata": {"name": "llama-cpp"}, "download_info": {"url": "https://x/llama_cpp-1.tar.gz"}}
LOG = (
    "2026-01-01T10:00:00,000   Downloading click-8-py3-none-any.whl (2.5 MB)\n"
    "2026-01-01T10:00:01,000   Downloading rich-14-py3-none-any.whl.metadata (800 bytes)\n"
    "2026-01-01T10:00:01,000   Building wheel for mlxq (pyproject.toml): started\n"
)


@pytest.mark.parametrize(
    ("installed", "log", "fault"),
    [
        ([WHEEL, OURS], LOG, None),
        ([WHEEL, OURS, ARCHIVE], LOG, "llama-cpp"),
        ([WHEEL, OURS], LOG + "2026-01-01T10:00:02,000   Building wheel for hatchling (pyproject.toml)", "hatchling"),
    ],
)
def test_what_pip_fetched_and_built(tmp_path: Path, installed: list[Any], log: str, fault: str | None) -> None:
    wheel = tmp_path / "local-1-py3-none-any.whl"
    wheel.write_bytes(bytes(1_500_000))
    (tmp_path / "report").write_text(json.dumps({"install": installed}))
    (tmp_path / "log").write_text(f"{log}\n2026-01-01T10:00:03,000 Processing {wheel}\n")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "fetched.py", tmp_path / "report", tmp_path / "log"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if fault is None else 1)
    if fault is None:
        assert done.stdout == "fetched 4 MB; built nothing but mlxq\n"
    else:
        assert done.stderr.endswith(f": {fault}\n")
