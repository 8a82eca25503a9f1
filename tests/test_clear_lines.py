"""Whatever a person or a stranger's file does, the command ends with one clear line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import llama
from tests.reliability.fuzz import fuzz
from tests.reliability.fuzz_targets import TARGETS

# A start of Python with everything that a plan needs takes 0.3 GB; ten times what any case here should take.
MOST_BYTES = 3 << 30
MOST_SECONDS = 120


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("clear") / "model")


@pytest.fixture
def model(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "model"))


def mlxq(*arguments: str | Path, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; ``shell`` is what stands after it on a command line of bash."""
    line = [sys.executable, "-m", "mlxq", *map(str, arguments)]
    if shell:
        line = ["bash", "-c", f'"$@" {shell}', "bash", *line]

    def limited() -> None:
        # Address space, of which MLX reserves much more than it uses; what is really allocated is far below.
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))

    # What measures coverage says a word of its own as a program ends, also where nobody takes it.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run(
        line,
        env={**inherited, "MLXQ_DEBUG": "0", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        preexec_fn=limited,
    )


def check(done: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    """One error line that says ``said``, the exit code, and no trace of a fault of ours."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == code, done.stderr
    assert len(errors) == 1, done.stderr
    assert said in errors[0]
    assert len(errors[0]) < 1100
    for ours in ("Traceback", "this is a fault of mlxq"):
        assert ours not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("recipes",), ("recipes", "schema"), ("recipes", "show", "4bit")])
@pytest.mark.parametrize(("shell", "reason"), [(">/dev/full", "No space left"), (">&-", "Bad file descriptor")])
def test_a_full_or_closed_stdout(arguments: tuple[str, ...], shell: str, reason: str) -> None:
    check(mlxq(*arguments, shell=shell), 1, f"cannot write stdout: {reason}")


@pytest.mark.parametrize("arguments", [("--help",), ("recipes",), ("recipes", "schema")])
def test_a_reader_that_went_away_is_no_error(arguments: tuple[str, ...]) -> None:
    done = mlxq(*arguments, shell="| true; exit ${PIPESTATUS[0]}")
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_closed_or_full_stderr_stops_nothing() -> None:
    for shell in ("2>&-", "2>/dev/full", "<&-"):
        done = mlxq("recipes", shell=shell)
        assert done.returncode == 0
        assert "4bit" in done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a" * 300, "File name too long"),
        ("~nosuchuser/model", "no such home"),
        ("file/inner", "no model at"),
        ("loop", "no model at"),
        ("pipe", "no model at"),
    ],
)
def test_names_that_are_no_model(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    check(mlxq("inspect", name if name.startswith("~") else tmp_path / name), 2, said)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "it is a pipe"),
    "a folder": (Path.mkdir, "it is a folder"),
    "a device": (lambda file: file.symlink_to("/dev/zero"), "it is a device"),
    "empty": (lambda file: file.write_bytes(b""), "not valid JSON"),
    "not UTF-8": (lambda file: file.write_bytes(b'{"a": "\xff"}'), "UTF-8"),
    "a list": (lambda file: file.write_text("[]"), "not a JSON object"),
    "deep": (lambda file: file.write_text("[" * 100_000), "nested too deeply"),
    "99 MB of lists": (lambda file: file.write_text("[" + "[]," * 33_000_000 + "[]]"), "at most"),
    "30 MB of lists": (lambda file: file.write_text("[" + "[]," * 10_000_000 + "[]]"), "values"),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer_config.json"])
@pytest.mark.parametrize("how", SPOILT)
def test_a_file_of_a_model_that_is_not_what_its_name_says(name: str, how: str, model: Path) -> None:
    if name == "tokenizer_config.json" and how in ("a pipe", "a folder", "a device"):
        pytest.skip("it does not travel, so it is not read")
    spoil, said = SPOILT[how]
    if how == "a device":
        said = "is a link out of the model's folder"
    (model / name).unlink(missing_ok=True)
    spoil(model / name)
    check(mlxq("inspect", model), 2, said)


def test_a_header_of_99_mb_of_empty_lists(model: Path) -> None:
    text = b'{"a":[' + b"[]," * 33_000_000 + b"[]]}"
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    check(mlxq("inspect", model), 2, "not a valid safetensors file")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**9, "fewer than one a layer"),
        ("hidden_size", 10**400, "a number that no model can have"),
        ("vocab_size", 1 << 60, "a number that no model can have"),
        ("num_hidden_layers", [10**9], "fewer than one a layer"),
        ("full_attention_interval", 0, "1 or more"),
        ("attn_layer_period", [0], "1 or more"),
        ("hybrid_override_pattern", 7, "a pattern of layers"),
        ("layer_types", 7, "a list"),
        ("text_config", [1], "an object"),
        ("model_type", ["llama"], "a text"),
        ("quantization", "4 bits", "an object"),
    ],
)
@pytest.mark.parametrize("command", [("inspect",), ("quantize", "4bit", "--dry-run", "--model")])
def test_a_config_of_another_shape(command: tuple[str, ...], key: str, value: object, said: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, key: value}))
    check(mlxq(*command, model), 2, said)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"schema": "mlxq.report"}',
        '{"schema": "mlxq.report", "schema_version": "1"}',
        '{"schema": "mlxq.report", "schema_version": 99}',
        '{"schema": "mlxq.report", "schema_version": 1, "source": [], "files": 3}',
    ],
)
def test_what_is_no_report_is_refused_wherever_one_is_read(content: str, model: Path, tmp_path: Path) -> None:
    (model / "mlxq.json").write_text(content)
    check(mlxq("quantize", "--locked", model / "mlxq.json"), 2, "mlxq.json")
    check(mlxq("upload", model, "org/name", "--dry-run"), 2, "mlxq.json")


@pytest.mark.parametrize("option", ["--text", "--prompts"])
@pytest.mark.parametrize("how", ["a pipe", "a folder", "a device", "a socket", "1 GB"])
def test_a_text_that_is_no_text(option: str, how: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text"
    if how == "a socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(file))
    elif how == "1 GB":
        with file.open("wb") as sparse:
            sparse.truncate(10**9)
    else:
        SPOILT[how][0](file)
    check(mlxq("compare", model, model, option, file, "--no-speed"), 2, "cannot read")


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "a", "b", "--html", "nowhere/page.html"),
        ("compare", "a", "b", "--plot", "."),
        ("quantize", "x", "--bpw", "4", "--frontier", "--plot", "nowhere/x.svg"),
        ("quantize", "x", "--bpw", "inf"),
        ("quantize", "x", "--bpw", "nan"),
        ("quantize", "4bit", "--model", "x\0y"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(arguments: tuple[str, ...], tmp_path: Path) -> None:
    if any("\0" in argument for argument in arguments):
        pytest.skip("the system itself takes no such argument")
    done = subprocess.run(
        [sys.executable, "-m", "mlxq", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=MOST_SECONDS
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "fault of mlxq" not in done.stderr


def test_names_reach_no_reader_as_commands(tmp_path: Path) -> None:
    hostile = tmp_path / "a\x1b[31m\u202eb"
    hostile.mkdir()
    done = mlxq("inspect", hostile)
    check(done, 2, "no config.json")
    assert not set(done.stderr) & set("\x1b\u202e")


@pytest.mark.parametrize("target", TARGETS)
def test_a_short_campaign_of_fuzzing(target: str) -> None:
    outcome = fuzz(target, 800, seed=1)
    assert outcome.good, f"{outcome}\n{outcome.failures}"
    # A target that refuses all it is given, or nothing, tests nothing.
    assert 0 < outcome.refused < outcome.executions
