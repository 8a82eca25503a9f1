"""``mlxq compare`` end to end on tiny models: folders, recipes applied in memory, gates, and bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mlxq.calibration.text import TextInfo, TokenizedText
from mlxq.cli import app
from mlxq.comparison.candidates import model_candidate, recipe_candidate
from mlxq.comparison.measure import Settings, compare, stored_candidate
from mlxq.comparison.pairing import check_predictable
from mlxq.comparison.result import Comparison
from mlxq.errors import BadInputError, GateError
from mlxq.pipeline import prepare, run
from mlxq.recipe.load import load_recipe, names_recipe
from mlxq.sources.resolve import resolve
from tests.checkpoints import LLAMA, VOCABULARY, add_start_token, build, llama, save

FAST = ("--no-speed", "--tokens", "1024")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``original`` and its ``4bit``."""
    root = tmp_path_factory.mktemp("models")
    llama(root / "original", hidden_size=64, intermediate_size=128)
    for _ in run(prepare(load_recipe("4bit"), resolve(str(root / "original"))), root / "4bit"):
        pass
    return root


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["compare", *arguments])


def facts(result: Result) -> dict[str, Any]:
    assert result.exception is None, result.exception
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def test_a_recipe_in_memory_measures_as_the_folder_it_would_write(models: Path) -> None:
    result = invoke(str(models / "original"), str(models / "4bit"), "4bit", "8bit", *FAST, "--json")
    reference, folder, recipe, better = facts(result)["models"]
    assert reference["metrics"]["bits_per_weight"] == 16
    for name in ("size_bytes", "bits_per_weight", "kl_mean", "kl_p99", "top1_agreement", "ppl"):
        assert recipe["metrics"][name] == pytest.approx(folder["metrics"][name], rel=1e-6), name
    assert recipe["layer_bits"] == pytest.approx(folder["layer_bits"])
    assert 0 < better["metrics"]["kl_mean"] < recipe["metrics"]["kl_mean"]


def test_a_model_compared_with_itself_is_at_distance_zero_and_tied(models: Path) -> None:
    original = stored_candidate("original", resolve(str(models / "original")))
    *_, last = compare(original, [original], Settings(tokens=1024, speed=None))
    assert isinstance(last, Comparison)
    assert last.complete
    found = last.candidates[0].faithfulness
    assert found is not None
    assert abs(found.kl_mean) < 1e-6
    assert found.top1_agreement == 1
    assert found.ppl_ratio == pytest.approx(1)
    assert last.candidates[0].tied


def test_results_go_into_the_candidates_report(models: Path) -> None:
    result = invoke(str(models / "original"), str(models / "4bit"), *FAST, "--json")
    measured = facts(result)["models"][1]["metrics"]["kl_mean"]
    report = json.loads((models / "4bit" / "mlxq.json").read_text())
    assert report["comparison"]["metrics"]["kl_mean"] == measured
    assert report["comparison"]["reference"] == "original"
    assert report["files"]


def test_gates_fail_with_exit_code_3_and_a_line_each(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    gates = ("--gate", "kl_mean<0", "--gate", "size_bytes<1B", "--gate", "bits_per_weight<9")
    result = invoke(str(models / "original"), str(models / "4bit"), *FAST, *gates)
    assert isinstance(result.exception, GateError)
    assert result.exception.exit_code == 3
    assert len(result.exception.message.splitlines()) == 2
    assert "4bit" in (tmp_path / "summary.md").read_text()


def test_models_of_one_name_are_told_apart_and_all_held_against_the_gates(models: Path, tmp_path: Path) -> None:
    for place, recipe in (("bad", "4bit"), ("good", "8bit")):
        plan = prepare(load_recipe(recipe), resolve(str(models / "original")))
        (tmp_path / place).mkdir()
        list(run(plan, tmp_path / place / "m"))
    arguments = (str(models / "original"), str(tmp_path / "bad" / "m"), str(tmp_path / "good" / "m"), *FAST)
    result = invoke(*arguments, "--gate", "bits_per_weight<6")
    assert isinstance(result.exception, GateError)
    assert "good/m" in result.exception.message
    assert [model["name"] for model in facts(invoke(*arguments, "--json"))["models"]] == ["original", "bad/m", "good/m"]


def test_nan_is_shown_as_nan_and_fails_every_gate(models: Path, tmp_path: Path) -> None:
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
    weights = build(config)[1]
    weights["model.norm.weight"] = weights["model.norm.weight"] * math.nan
    broken = save(tmp_path / "broken", config, weights)
    result = invoke(str(models / "original"), str(broken), *FAST, "--gate", "kl_mean<1e9")
    assert isinstance(result.exception, GateError)
    assert "NaN" in result.stdout
    assert "nan" in facts(invoke(str(models / "original"), str(broken), *FAST, "--json"))["models"][1]


def test_speed_and_answers_come_from_a_process_of_their_own(models: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('abc\n[{"role": "user", "content": "def"}]\n')
    result = invoke(
        str(models / "original"),
        str(models / "4bit"),
        "--tokens",
        "1024",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--json",
    )
    for model in facts(result)["models"]:
        assert model["metrics"]["generation_tps"] > 0
        assert model["metrics"]["peak_memory_bytes"] > 0
        assert [answer["prompt"] for answer in model["answers"]] == ["abc", "def"]


def test_html_is_one_file_without_outside_requests(models: Path, tmp_path: Path) -> None:
    page, plot = tmp_path / "r.html", tmp_path / "p.svg"
    result = invoke(str(models / "original"), "4bit", *FAST, "--html", str(page), "--plot", str(plot), "--markdown")
    assert result.exception is None
    assert result.stdout.startswith("| model |")
    assert "<svg" in page.read_text()
    assert plot.read_text().startswith("<svg")
    assert not any(word in page.read_text() for word in ("<script src", "<link", "url(http", "@import"))


def perplexity(folder: Path, text: str, start: list[int], window: int, scored: int, step: int) -> float:
    """By ``mlx_lm`` alone, in fp32: windows of ``window`` text tokens every ``step``, the last ``scored`` predicted."""
    from mlx_lm import load

    model, tokenizer = load(str(folder))[:2]
    model.set_dtype(mx.float32)
    ids = tokenizer._tokenizer.encode(text, add_special_tokens=False)
    rows = mx.array([[*start, *ids[i : i + window]] for i in range(0, len(ids) - step + 1, step)])
    logits = model(rows[:, :-1])[:, -scored:]
    chosen = mx.take_along_axis(logits, rows[:, -scored:, None], -1)[..., 0]
    return float(mx.exp(mx.mean(mx.logsumexp(logits, -1) - chosen)))


def test_every_sequence_begins_with_the_token_that_the_tokenizer_adds(models: Path, tmp_path: Path) -> None:
    folder = llama(tmp_path / "starting", hidden_size=64, intermediate_size=128)
    add_start_token(folder)
    text = "HELLOWORLD,THISISATEXTOFPLAINWORDS." * 60
    (tmp_path / "t.txt").write_text(text)
    on_text = (str(folder), str(folder), "--no-speed", "--text", str(tmp_path / "t.txt"))
    found = facts(invoke(*on_text, "--json"))
    usual, without = (perplexity(folder, text, start, 257, 256, 257) for start in ([1], []))
    assert found["models"][1]["metrics"]["ppl"] == pytest.approx(usual, rel=2e-5)
    assert usual != pytest.approx(without, rel=2e-4)
    assert found["text"]["start_tokens"] == [1]
    assert found["text"]["tokens"] == len(text) // 257 * 256
    assert "each begun by the tokenizer's start token (id 1)" in " ".join(invoke(*on_text, "--markdown").stdout.split())

    halves = facts(invoke(*on_text, "--window", "512", "--score", "last-half", "--json"))
    expected = perplexity(folder, text, [1], 511, 255, 512)
    assert halves["models"][1]["metrics"]["ppl"] == pytest.approx(expected, rel=2e-5)
    assert (halves["text"]["sequence_tokens"], halves["text"]["scored_tokens"]) == (512, 255)


def test_a_start_token_that_is_named_and_never_added_is_not_put_in_front(models: Path) -> None:
    original = str(models / "original")
    assert facts(invoke(original, original, *FAST, "--json"))["text"]["start_tokens"] == []
    result = invoke(original, original, *FAST)
    assert "Sequences of 256 tokens, without a start token" in " ".join(result.stderr.split())


@pytest.mark.parametrize("rows", [VOCABULARY + 32, 2 * VOCABULARY])
def test_more_rows_than_the_reference_are_left_out_of_both(tmp_path: Path, rows: int) -> None:
    """Padding of an embedding changes no model: rows of the same ids are compared, whichever of the two has more."""
    config = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
    _, weights = build(config)
    save(tmp_path / "plain", config, weights)
    padded = {
        path: mx.concatenate([array, mx.zeros((rows - VOCABULARY, 64), array.dtype)])
        if path in ("model.embed_tokens.weight", "lm_head.weight")
        else array
        for path, array in weights.items()
    }
    save(tmp_path / "padded", {**config, "vocab_size": rows}, padded)
    plain, more = str(tmp_path / "plain"), str(tmp_path / "padded")
    alone = facts(invoke(plain, plain, *FAST, "--json"))["models"][1]["metrics"]
    for first, second, said in ((plain, more, f"padded has {rows}"), (more, plain, f"plain has {VOCABULARY}")):
        found = facts(invoke(first, second, *FAST, "--json"))
        measured = found["models"][1]["metrics"]
        assert measured["kl_mean"] == pytest.approx(0, abs=1e-6)
        assert measured["top1_agreement"] == 1
        assert measured["ppl"] == pytest.approx(alone["ppl"], rel=1e-5)
        notes = " ".join(found["notes"])
        assert said in notes
        assert f"compared on the ids that both have, below {VOCABULARY}." in notes


def test_a_text_past_the_logits_that_both_have_is_refused() -> None:
    text = TextInfo("t", "", "", 2, 2, 2, ())
    check_predictable(TokenizedText(text, np.array([[0, 94, 95]], np.int32)), 96, "cut")
    with pytest.raises(BadInputError, match="cut: the text has token id 96, and it and the reference share 96 logits"):
        check_predictable(TokenizedText(text, np.array([[0, 96, 95]], np.int32)), 96, "cut")


def test_a_window_past_the_models_context_is_refused(tmp_path: Path) -> None:
    folder = str(llama(tmp_path / "short", max_position_embeddings=300))
    error = invoke(folder, folder, *FAST, "--window", "512").exception
    assert isinstance(error, BadInputError)
    assert error.message.startswith("a window of 512 tokens is longer than ")
    assert error.message.endswith("short's context, 300")


def test_different_tokenizers_are_refused(models: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", hidden_size=64, intermediate_size=128)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = invoke(str(models / "original"), str(other), *FAST)
    assert isinstance(result.exception, BadInputError)
    assert "tokenizer" in result.exception.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("original",), "nothing to compare"),
        (("original", "nowhere"), "no model at"),
        (("original", "4bit", "--gate", "kl_meen<1"), "kl_mean"),
        (("original", "4bit", "--text", "missing.txt"), "missing.txt"),
        (("original", "4bit", "--text", "short.txt"), "short"),
        (("original", "4bit", "--plot", "x.pdf"), "--plot"),
    ],
)
def test_bad_input_is_one_clear_line(
    models: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(models)
    (models / "short.txt").write_text("too little")
    result = invoke(*arguments, "--no-speed")
    assert isinstance(result.exception, BadInputError)
    assert said in result.exception.message + (result.exception.hint or "")
    assert len(result.exception.message.splitlines()) == 1


def test_recipes_and_models_are_told_apart(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_recipe("mixed_4_6")
    assert names_recipe("some/recipe.yaml")
    assert not names_recipe("org/name")
    monkeypatch.chdir(models)
    assert not names_recipe("4bit"), "a folder of that name is there"


def test_a_recipe_keeps_what_the_plan_keeps(models: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("default: {bits: 8}\nrules: [{match: lm_head, keep: true}]\n")
    reference = model_candidate(resolve(str(models / "original")), tmp_path)
    model = recipe_candidate(load_recipe(tmp_path / "r.yaml"), reference, tmp_path).load()
    assert not hasattr(model.lm_head, "scales")
    assert model.lm_head.weight.dtype == mx.bfloat16
    assert model.model.layers[0].mlp.down_proj.bits == 8


def test_quantize_checks_the_gates_of_its_recipe(models: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "gated.yaml"
    recipe.write_text("default: {bits: 4}\ngates: ['bits_per_weight<9', 'kl_mean<0']\n")
    arguments = [
        "quantize",
        str(recipe),
        "--model",
        str(models / "original"),
        "--no-generate",
        "-o",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, GateError)
    assert result.exception.message.splitlines() == [
        line for line in result.exception.message.splitlines() if "kl_mean" in line
    ]
    assert json.loads((tmp_path / "out" / "mlxq.json").read_text())["comparison"]["metrics"]["kl_mean"] > 0
    recipe.write_text("default: {bits: 4}\ngates: ['kl_meen<0']\n")
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, BadInputError)
    assert "gated.yaml:2: gates[0]" in result.exception.message
