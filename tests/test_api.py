"""The package as somebody meets it who writes ``import mlxq``."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import gguf
import pytest

import mlxq
from mlxq.comparison.result import Comparison
from mlxq.show.html import as_html, table_html
from mlxq.show.tables import plain_table
from tests.documents import ROOT, inline_code
from tests.gguf_files import write_gguf
from tests.test_docs import stand_in
from tests.test_imports import HEAVY, loaded_by

VERBS = ("inspect", "plan", "quantize", "convert", "compare", "upload")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    return stand_in(tmp_path / "model", num_hidden_layers=2)


# -- the door


def test_importing_it_loads_nothing_heavy() -> None:
    assert not loaded_by("import mlxq; dir(mlxq)") & (HEAVY | {"pydantic", "yaml", "rich", "typer"})


def test_naming_a_verb_does_not_load_mlx() -> None:
    assert not loaded_by("import mlxq; mlxq.quantize, mlxq.Plan, mlxq.Target") & {"mlx", "mlx_lm", "transformers"}


def test_all_of_it_is_in_the_docs_and_nothing_else() -> None:
    named = {code.removeprefix("mlxq.") for code in inline_code(ROOT / "docs" / "python.md") if code[:5] == "mlxq."}
    assert {name for name in named if name.isidentifier()} == set(mlxq.__all__)


def test_it_shows_its_names_and_has_no_others() -> None:
    assert set(dir(mlxq)) == {*mlxq.__all__, "__version__"}
    for name in mlxq.__all__:
        assert getattr(mlxq, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        mlxq.quantise  # noqa: B018


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_what_it_takes_and_raises(verb: str) -> None:
    function = getattr(mlxq, verb)
    assert "Raises " in (inspect.getdoc(function) or "")
    options = inspect.signature(function).parameters.values()
    for option in options:
        if option.default is not inspect.Parameter.empty:
            assert option.kind is inspect.Parameter.KEYWORD_ONLY
    assert {"on_event", "trust_remote_code"} <= {option.name for option in options}


def test_a_caller_is_checked_by_mypy_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    caller = tmp_path / "caller.py"
    caller.write_text(
        "import mlxq\n\n"
        "def size(model: str) -> int:\n"
        "    made: mlxq.Finished = mlxq.quantize(model, {'default': {'bits': 4}}, on_event=lambda event: None)\n"
        "    plan: mlxq.Plan = mlxq.plan(model, '4bit')\n"
        "    reveal_type(mlxq.compare(model, made.out, tokens=512))\n"
        "    return plan.file_bytes\n"
        "mlxq.quantize(3, '4bit')\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "c")]
    done = subprocess.run([*command, str(caller)], capture_output=True, text=True, cwd=ROOT)
    assert 'Revealed type is "mlxq.comparison.result.Comparison"' in done.stdout
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert '"quantize" has incompatible type "int"' in errors[0]


# -- the verbs


def test_a_first_afternoon_prints_nothing(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Any] = []
    found = mlxq.inspect(model, text="!")
    assert found.inspection.layer_count == 2
    assert found.encoding is not None
    assert found.encoding.round_trips
    made = mlxq.quantize("model", "4bit", on_event=events.append)
    assert made.out == Path("model-4bit")
    assert json.loads((made.out / "mlxq.json").read_text()) == made.report
    compared = mlxq.compare(
        "model",
        made.out,
        "mixed_4_6",
        {"default": {"bits": 3, "group_size": 64}},
        tokens=512,
        speed=False,
        on_event=events.append,
    )
    assert [result.name for result in compared.candidates] == ["model-4bit", "mixed_4_6", "recipe"]
    few, many = compared.candidates[2], compared.candidates[1]
    assert few.metrics()["kl_mean"] > many.metrics()["kl_mean"] > 0  # type: ignore[operator]
    assert [len(e.candidates) for e in events if isinstance(e, Comparison)] == [0, 1, 2, 3]
    plain = mlxq.convert(made.out, dequantize=True, output="plain")
    assert plain.report["metrics"]["bits_per_weight"] >= 16
    assert capfd.readouterr() == ("", "")
    for event in events:
        assert is_dataclass(event)
        with pytest.raises(FrozenInstanceError):
            setattr(event, fields(event)[0].name, None)


def test_a_budget_in_a_dict_is_spent(model: Path) -> None:
    recipe = {"budget": {"bpw": 4.5}, "calibration": {"text": "none"}}
    planned = mlxq.plan(model, recipe)
    assert planned.spending is not None
    assert 4.3 < planned.bits_per_weight <= 4.5
    made = mlxq.quantize(model, recipe)
    assert made.report["budget"]["curve"] == list(planned.spending["curve"])
    assert made.report["metrics"]["weight_bytes"] == planned.weight_bytes


def test_a_dict_is_a_recipe_as_a_file_is(model: Path) -> None:
    """It extends others, by name or by a path from the working folder, and a rule of its own must mean something."""
    Path("mine.yaml").write_text("extends: 4bit\nrules: [{match: v_proj, bits: 6}]\n")
    planned = mlxq.plan(model, {"extends": "mine.yaml", "rules": [{"match": "lm_head", "bits": 8}]})
    bits = {path: decision.format.bits for path, decision in planned.by_path.items() if decision.format}
    assert bits["lm_head"] == 8
    assert bits["model.layers.1.self_attn.v_proj"] == 6
    assert bits["model.layers.1.self_attn.q_proj"] == 4
    shadowed = {"rules": [{"match": "*", "bits": 4}, {"match": "lm_head", "bits": 8}]}
    with pytest.raises(mlxq.RecipeError, match=r"rules\[1\]: never decides anything"):
        mlxq.plan(model, shadowed)


def test_what_is_asked_wrongly_is_said_before_any_work(model: Path) -> None:
    (model.parent / "there").mkdir()
    with pytest.raises(mlxq.RecipeError, match="did you mean 'bits'"):
        mlxq.quantize("no-such-model", {"default": {"bitz": 4}})
    with pytest.raises(mlxq.BadInputError, match="there already exists") as caught:
        mlxq.quantize("no-such-model", "4bit", output="there")
    assert "force" in str(caught.value.hint)
    with pytest.raises(mlxq.BadInputError, match="nothing to compare"):
        mlxq.compare("no-such-model")
    with pytest.raises(mlxq.BadInputError, match="prompts are answered where speed is measured"):
        mlxq.compare("no-such-model", "4bit", prompts=["Why?"], speed=False)
    with pytest.raises(mlxq.BadInputError, match="exclude each other"):
        mlxq.convert("no-such-model", dequantize=True, keep_quantization=True)
    with pytest.raises(mlxq.MlxqError, match="no-such-model"):
        mlxq.inspect("./no-such-model")


def test_force_replaces_and_requantize_reads_what_is_quantized(model: Path) -> None:
    four = mlxq.quantize(model, "4bit", output="made")
    again = mlxq.quantize(model, "8bit", output="made", force=True)
    assert again.report["metrics"]["bits_per_weight"] > four.report["metrics"]["bits_per_weight"]
    with pytest.raises(mlxq.BadInputError, match="already quantized"):
        mlxq.plan("made", {"default": {"bits": 3}})
    assert mlxq.plan("made", {"default": {"bits": 3}}, requantize=True).bits_per_weight < 4


def test_convert_keeps_the_blocks_of_a_gguf_file_where_asked(model: Path) -> None:
    write_gguf(Path("model.gguf"), types={"model.embed_tokens.weight": gguf.GGMLQuantizationType.Q4_0})
    kept = mlxq.convert("model.gguf", keep_quantization=True, output="kept")
    plain = mlxq.convert("model.gguf", output="plain")
    bits = [made.report["modules"][0]["format"] for made in (kept, plain)]
    assert bits == [{"group_size": 32, "bits": 4, "mode": "affine"}, None]


def test_a_gate_that_fails_loses_neither_model_nor_comparison(model: Path) -> None:
    events: list[Any] = []
    with pytest.raises(mlxq.GateError, match="kl_mean<1e-09"):
        mlxq.compare(model, "4bit", tokens=512, speed=False, gates="kl_mean<1e-09", on_event=events.append)
    assert events[-1].complete
    with pytest.raises(mlxq.GateError, match="size_bytes<1") as caught:
        mlxq.quantize(model, {"default": {"bits": 4}, "gates": ["size_bytes<1"]})
    assert str(caught.value.hint) == "The model is in model-recipe."
    assert Path("model-recipe/mlxq.json").is_file()


def test_what_is_compared_on_may_be_one_text_and_one_question(model: Path) -> None:
    Path("notes.txt").write_text("a; b; c; " * 2000)
    compared = mlxq.compare(model, "4bit", texts="notes.txt", tokens=512, prompts="Why?")
    assert compared.text.name == "notes.txt"
    assert compared.reference.speed is not None
    assert [answer.prompt for answer in compared.reference.speed.answers] == ["Why?"]


def test_upload_takes_a_name_or_a_target(model: Path, hub: Any, capfd: pytest.CaptureFixture[str]) -> None:
    made = mlxq.quantize(model, "4bit")
    assert mlxq.upload(made.out, "org/plain").created
    assert mlxq.upload(made.out, mlxq.Target("org/hidden", private=True)).created
    assert capfd.readouterr() == ("", "")
    assert (hub.repos["org/plain"].private, hub.repos["org/hidden"].private) == (False, True)


# -- in a notebook


class Page(HTMLParser):
    """The tags and the text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_results_show_themselves_as_tables_and_plots(model: Path) -> None:
    assert Page(mlxq.inspect(model)._repr_html_()).tags.count("table") == 3
    found = Page(mlxq.inspect(model, text="!")._repr_html_())
    assert found.tags.count("table") == 4
    assert "decodes backyes" in found.text
    assert "model.layers.{0-1}.mlp.down_proj" in found.text
    planned = Page(mlxq.plan(model, "4bit")._repr_html_())
    assert planned.tags.count("table") == 1
    assert f"Plan for {model}" in planned.text
    assert "svg" not in planned.tags
    budget = {"budget": {"bpw": 4.5}, "calibration": {"text": "none"}}
    assert Page(mlxq.plan(model, budget)._repr_html_()).tags.count("svg") == 1
    finished = Page(mlxq.quantize(model, budget)._repr_html_())
    assert finished.tags.count("svg") == 1
    assert "bits per weight" in finished.text
    compared = Page(mlxq.compare(model, "4bit", tokens=512, speed=False)._repr_html_())
    assert compared.tags.count("svg") == 1
    assert compared.tags.count("table") == 2
    assert "4bit is " in compared.text


def test_what_came_from_files_is_escaped(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["<script>alert(1)</script>"]
    (model / "config.json").write_text(json.dumps(config))
    html = mlxq.inspect(model)._repr_html_()
    assert "script" not in Page(html).tags
    assert "<script>alert(1)</script>" in Page(html).text


def test_a_table_keeps_its_marks_and_its_sides() -> None:
    table = plain_table("what", "bytes", title="All [bold]of it[/]", right=("bytes",))
    table.add_row("a \\[b] \x1b<c>", "[green]*1[/] [dim]2[/]")
    table.add_row("left", "3", style="dim")
    html = table_html(table)
    assert Page(html).text == "All of itwhatbytesa [b] <c>*1 2left3"
    assert '<th style="text-align:right">bytes</th>' in html
    assert '<td style="text-align:right"><span style="color:green">*1</span> <span style="opacity:.6">2</span>' in html
    assert '<tr style="opacity:.6"><td style="text-align:left">left</td>' in html


def test_the_same_result_is_drawn_the_same(model: Path) -> None:
    planned = mlxq.plan(model, {"budget": {"bpw": 4.5}, "calibration": {"text": "none"}})
    assert as_html(planned) == as_html(planned)
