"""The question after a run is a courtesy: whatever a model's files do, it is one line, and the run is what it was."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from mlxq.cli import app
from mlxq.errors import GateError, MlxqError
from mlxq.machine.child import Limits
from mlxq.running.opened import open_folder, prompt_tokens
from mlxq.running.question import Generation, NotAsked, answer_question, ask
from tests.checkpoints import LLAMA, VOCABULARY, build, llama, save

ROOMY = 4_000_000_000
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# A model file that is llama's, after it does something of its own.
MODEL_FILE = "import os, signal\n{}\nfrom mlx_lm.models.llama import Model, ModelArgs\n"


def configure(folder: Path, **settings: Any) -> None:
    """Change ``tokenizer_config.json``."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def lfs_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


def own_tokenizer_code(folder: Path) -> None:
    configure(folder, auto_map={"AutoTokenizer": ["tok.Tok", None]}, tokenizer_class="Tok")
    (folder / "tok.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")


def ids_past_the_embedding(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["w"] = 10_000_000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def own_model_code(folder: Path, statement: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "mine.py"}))
    (folder / "mine.py").write_text(MODEL_FILE.format(statement))


def nan(folder: Path) -> None:
    weights = build(LLAMA)[1]
    weights["model.norm.weight"] = weights["model.norm.weight"] * math.nan
    save(folder, LLAMA, weights)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no tokenizer": (no_tokenizer, "its tokenizer is missing"),
    "a pointer for a tokenizer": (lfs_pointer, "is a Git LFS pointer, not the file itself"),
    "settings of the wrong shape": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "its tokenizer does not load: ",
    ),
    "its own tokenizer code": (own_tokenizer_code, "its tokenizer wants to run its own code, which was not trusted"),
    "its own model code": (lambda folder: own_model_code(folder, ""), "wants to run its own code (mine.py)"),
    "token ids past the embedding": (ids_past_the_embedding, "token id 10000000, and the model's embedding has 96"),
    "template with a syntax error": (
        lambda folder: configure(folder, chat_template="{% for m in messages %}{{ m.content }"),
        "its chat template fails: TemplateSyntaxError",
    ),
    "template that raises": (
        lambda folder: configure(folder, chat_template="{{ raise_exception('no\x1b[31m\\nroles') }}"),
        "its chat template fails: TemplateError: no [31m roles",
    ),
    "templates without a default": (
        lambda folder: configure(folder, chat_template=[{"name": "tool_use", "template": "x"}]),
        "its chat template fails: ValueError: This model has multiple chat templates",
    ),
    "template that makes nothing": (
        lambda folder: configure(folder, chat_template="{# nothing #}"),
        "its chat template makes no tokens of the prompt",
    ),
    "numbers that are none": (nan, "the model computes NaN"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_model_that_cannot_be_asked_is_one_line(kind: str, tmp_path: Path) -> None:
    spoil, reason = HOSTILE[kind]
    folder = llama(tmp_path / "model")
    spoil(folder)
    found = ask(folder)
    assert isinstance(found, NotAsked)
    assert found.failed
    assert found.reason.startswith("could not be asked: ")
    assert reason in found.reason
    assert found.reason.isprintable()
    assert str(tmp_path) not in found.reason
    assert not (folder / "RAN").exists()


def test_a_template_that_never_ends_is_given_up(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    configure(folder, chat_template=ENDLESS)
    assert ask(folder, limits=Limits(5, ROOMY)) == NotAsked("could not be asked: it took over 5 s", failed=True)
    with pytest.raises(MlxqError, match="its chat template took over 0 s"):
        prompt_tokens(open_folder(folder), "why?", seconds=0.2)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_that_eats_memory_is_stopped(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    configure(folder, chat_template="{% set x = 'aaaaaaaa' * 1000000000 %}{{ x }}")
    found = ask(folder, limits=Limits(60, 1_500_000_000))
    assert found == NotAsked("could not be asked: it took over 1.5 GB of memory", failed=True)


def test_a_crash_of_trusted_code_is_a_line_and_trust_reaches_the_question(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    own_model_code(folder, "")
    assert isinstance(ask(folder, trusted=True), Generation)
    own_model_code(folder, "os.kill(os.getpid(), signal.SIGSEGV)")
    found = ask(folder, trusted=True)
    assert isinstance(found, NotAsked)
    assert "ended by SIGSEGV" in found.reason


def test_an_answer_that_would_come_too_late_is_left_out_after_a_token(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    request = {"folder": str(folder), "trusted": False, "until": time.monotonic()}
    left_out = answer_question(request)["left_out"]
    assert left_out.startswith("one token takes ")
    assert "so the answer would take about" in left_out
    assert answer_question({**request, "until": time.monotonic() + 600})["prompt"]


def test_a_model_larger_than_the_free_memory_is_not_asked(tmp_path: Path) -> None:
    # A sparse file: the weights are never read.
    config = {**LLAMA, "vocab_size": 2_000_000_000}
    folder = llama(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    header = json.loads((folder / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}")
    header.pop("__metadata__", None)
    offset = 0
    for name, entry in header.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            entry["shape"][0] = config["vocab_size"]
        size = 2 * math.prod(entry["shape"])
        entry["data_offsets"] = [offset, offset + size]
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    expected = "was not asked: it is too large for this machine's free memory"
    assert ask(folder) == NotAsked(expected, failed=False)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_run_is_what_it_was(tmp_path: Path) -> None:
    folder, out, recipe = llama(tmp_path / "model"), tmp_path / "out", tmp_path / "gated.yaml"
    configure(folder, chat_template="{{ raise_exception('no') }}")
    recipe.write_text("default: {bits: 4}\ngates: ['bits_per_weight<9']\n")
    result = invoke("quantize", str(recipe), "--model", str(folder), "-o", str(out), "--json", "-q")
    assert result.exit_code == 0
    reason = "could not be asked: its chat template fails: TemplateError: no"
    assert result.stderr == f"note: the new model {reason}\n"
    report = json.loads(result.stdout)
    assert report["not_asked"] == reason
    assert "generation" not in report
    written = json.loads((out / "mlxq.json").read_text())
    assert written["not_asked"] == reason
    assert written["comparison"]["metrics"]["kl_mean"] > 0, "the gates were held"
    rebuilt = invoke(
        "quantize", "--locked", str(out / "mlxq.json"), "--model", str(folder), "-o", str(tmp_path / "again")
    )
    assert rebuilt.exit_code == 0
    assert rebuilt.stderr.splitlines().count(f"note: the new model {reason}") == 1


def test_settings_of_the_wrong_shape_do_not_end_the_run(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text("[]")
    result = invoke("quantize", "4bit", "--model", str(folder), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert "could not be asked: its tokenizer does not load" in result.stderr


def test_an_answer_that_ends_at_once_is_shown_as_that(tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(VOCABULARY))}))
    result = invoke("quantize", "4bit", "--model", str(folder), "-o", str(tmp_path / "out"))
    assert result.exit_code == 0
    assert "nothing: it ended at once" in result.stdout
    assert json.loads((tmp_path / "out" / "mlxq.json").read_text())["generation"]["text"] == ""


def test_ctrl_c_during_the_question_stops_the_command_and_keeps_the_model(tmp_path: Path) -> None:
    folder, out = llama(tmp_path / "model"), tmp_path / "out"
    configure(folder, chat_template=ENDLESS)
    run = subprocess.Popen(
        [sys.executable, "-m", "mlxq", "quantize", "4bit", "--model", str(folder), "-o", str(out), "-q"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    asking: list[psutil.Process] = []
    while not (out.is_dir() and asking and asking[0].cpu_times().user > 0.5):
        assert run.poll() is None
        asking = psutil.Process(run.pid).children()
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert (run.returncode, said) == (130, f"note: stopped; {out} is complete, and nothing more was done with it\n")
    assert not any(child.is_running() for child in asking)
    assert (out / "mlxq.json").is_file()


def test_compare_goes_on_without_the_speed_of_a_model_that_cannot_be_timed(tmp_path: Path) -> None:
    good, bad = llama(tmp_path / "good"), llama(tmp_path / "bad")
    configure(bad, chat_template="{{ raise_exception('no') }}")
    (tmp_path / "prompts.txt").write_text("abc\n")
    page = tmp_path / "page.html"
    result = invoke(
        "compare",
        *(str(good), str(bad), "8bit"),
        *("--tokens", "512", "--prompts", str(tmp_path / "prompts.txt"), "--json", "--html", str(page)),
        *("--gate", "generation_tps>0", "--gate", "kl_mean<1"),
    )
    line = "bad: speed not measured: its chat template fails: TemplateError: no"
    assert result.stderr.splitlines().count(f"note: {line}") == 1
    models = {model["name"]: model for model in json.loads(result.stdout)["models"]}
    assert models["good"]["metrics"]["generation_tps"] > 0
    assert models["good"]["answers"]
    assert "generation_tps" not in models["bad"]["metrics"]
    assert models["bad"]["not_timed"] == line.partition(": speed not measured: ")[2]
    assert models["bad"]["metrics"]["kl_mean"] < 1e-6
    assert f"{line}." in page.read_text()
    assert isinstance(result.exception, GateError)
    failed = result.exception.message.splitlines()
    assert "gate failed for bad: generation_tps was not measured; the gate is generation_tps>0" in failed
