"""The commands as a person meets them: what goes where, and how each ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mlxq.cli import app
from mlxq.errors import BadInputError
from mlxq.files import sha256_file
from tests.checkpoints import llama


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(llama(tmp_path / "model"))


def test_the_planned_bytes_are_the_files_bytes(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = json.loads(invoke("quantize", "mixed_4_6", "--model", model, "--dry-run", "--json").stdout)
    assert not out.exists()
    written = json.loads(
        invoke("quantize", "mixed_4_6", "--model", model, "-o", str(out), "--json", "--no-generate").stdout
    )
    assert planned["schema"] == "mlxq.plan"
    assert planned["files"] == {"model.safetensors": (out / "model.safetensors").stat().st_size}
    assert written["metrics"]["size_bytes"] == planned["file_bytes"]


def test_locked_rebuilds_the_same_bytes_and_notices_another_source(model: str, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    invoke("quantize", "lm-head-6", "--model", model, "-o", str(first), "--no-generate")
    result = invoke(
        "quantize", "--locked", str(first / "mlxq.json"), "--model", model, "-o", str(again), "--no-generate"
    )
    assert result.exception is None
    for name in ("model.safetensors", "config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert sha256_file(first / name) == sha256_file(again / name)
    other = llama(tmp_path / "other", hidden_size=64)
    result = invoke("quantize", "--locked", str(first / "mlxq.json"), "--model", str(other), "-o", str(tmp_path / "x"))
    assert isinstance(result.exception, BadInputError)
    assert "not the model that was quantized" in result.exception.message


def test_a_rule_for_the_head_of_a_tied_model_means_its_embedding(tmp_path: Path) -> None:
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    plan = json.loads(invoke("quantize", "lm-head-6", "--model", str(tied), "--dry-run", "--json").stdout)
    embedding = plan["modules"][0]
    assert embedding["path"] == "model.embed_tokens"
    assert embedding["format"]["bits"] == 6
    assert "tied" in embedding["note"]


def test_a_width_that_64_does_not_divide_falls_back_or_is_an_error(tmp_path: Path) -> None:
    odd = str(llama(tmp_path / "odd", hidden_size=96, intermediate_size=80))
    plan = json.loads(invoke("quantize", "4bit", "--model", odd, "--dry-run", "--json").stdout)
    formats = {m["path"]: m["format"] for m in plan["modules"]}
    assert formats["model.layers.0.mlp.up_proj"]["group_size"] == 32
    assert formats["model.layers.0.mlp.down_proj"] is None
    result = invoke("quantize", "4bit", "--model", odd, "--dry-run", "--set", "strict=true")
    assert isinstance(result.exception, BadInputError)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quantize", "4bitt", "--model", "x"), "4bit"),
        (("quantize", "4bit"), "names no model"),
        (("quantize", "4bit", "--model", "nowhere"), "no model at"),
        (("quantize",), "name a recipe"),
        (("inspect", "nowhere"), "no model at"),
        (("inspect", "."), "no config.json"),
        (("inspect", "nowhere", "--why", "lm_head"), "--why"),
        (("inspect", "nowhere", "--recipe", "4bit", "--device", "nonsense"), "--recipe shows a plan"),
        (("recipes", "show", "missing"), "missing"),
    ],
)
def test_bad_input_is_said_in_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = invoke(*arguments).exception
    assert isinstance(error, BadInputError)
    assert error.exit_code == 2
    assert said in error.message
    assert len(error.message.splitlines()) == 1


def test_env_never_shows_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    result = invoke("env", "--json")
    assert json.loads(result.stdout)["hub_login"] is True
    assert "hf_secret" not in result.output


def test_faults_of_a_recipe_as_json(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("default: {bits: 7}\nrules:\n  - macth: lm_head\n")
    result = invoke("recipes", "check", str(bad), "--json")
    found = json.loads(result.stdout)
    assert found["schema"] == "mlxq.recipe-check"
    assert {line.split(": ")[0] for line in found["faults"]} == {f"{bad}:1", f"{bad}:3"}
    assert isinstance(result.exception, BadInputError)
    good = invoke("recipes", "check", "4bit", "--json")
    assert json.loads(good.stdout)["faults"] == []
    shown = json.loads(invoke("recipes", "show", "4bit", "--json").stdout)["recipes"]
    assert shown[0]["recipe"]["default"]["bits"] == 4
