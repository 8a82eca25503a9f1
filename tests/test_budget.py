"""Budgets and methods on real tiny models: what they land on, what they lose, and that they can be done again."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from typer.testing import CliRunner

from mlxq.budget.scoring import ROUTER_BITS, Scoring, allowed_formats
from mlxq.budget.spend import Spending
from mlxq.calibration.measured import measured_divergences
from mlxq.calibration.sensitivity import divergence, scores
from mlxq.calibration.streamed import streamed_model
from mlxq.calibration.tokens import calibration_text
from mlxq.cli import app
from mlxq.errors import BadInputError
from mlxq.methods.formats import Format
from mlxq.methods.rtn import round_to_nearest
from mlxq.pipeline import Allocated, Finished, allocated_plan, compared_files, prepare, prepare_locked, run
from mlxq.planning.plan import By, Plan
from mlxq.recipe.load import budget_recipe, recipe_from_dict
from mlxq.sources.resolve import resolve
from mlxq.writing.execute import Written
from mlxq.writing.report import read_report
from tests.checkpoints import build, llama, save
from tests.test_bit_identity import CONFIGS
from tests.test_foreign import DEEPSEEK
from tests.test_plan import HUNYUAN

# Enough text to calibrate a model of this size, and little enough to be quick.
FEW = "calibration={tokens: 2048}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of one model are taken once for all tests; the user's own cache is left alone."""
    monkeypatch.setenv("MLXQ_CACHE", str(cache))


def spent(model: Path, bpw: float, *sets: str) -> tuple[Plan, Spending, list[str]]:
    """The plan of a budget, how it was spent, and the stages it took."""
    draft = prepare(budget_recipe({"bpw": bpw}, [FEW, *sets]), resolve(str(model)))
    stages = []
    for event in allocated_plan(draft):
        if isinstance(event, Scoring):
            stages.append(event.stage)
        else:
            return event.plan, event.spending, stages
    raise AssertionError("a budget ends with a plan")


def written(plan: Plan, out: Path) -> Finished:
    *_, last = run(plan, out)
    assert isinstance(last, Finished)
    return last


def recipe_of(**keys: Any) -> Any:
    return recipe_from_dict({"calibration": {"tokens": 2048}, **keys}, "test")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)


@pytest.mark.parametrize("bpw", [3.2, 4.1, 5.0, 6.3])
def test_a_budget_is_met_to_half_a_percent(deep: Path, bpw: float, tmp_path: Path) -> None:
    plan, spending, _ = spent(deep, bpw)
    assert plan.bits_per_weight <= bpw
    assert plan.bits_per_weight > 0.995 * bpw
    assert plan.weight_bytes == spending.weight_bytes
    finished = written(plan, tmp_path / "out")
    assert finished.report["metrics"]["bits_per_weight"] == plan.bits_per_weight
    mlx_lm.load(str(tmp_path / "out"))


def test_what_takes_a_little_more_is_measured_and_not_chosen(deep: Path) -> None:
    uniform = prepare(recipe_from_dict({"default": {"bits": 4, "group_size": 64}}, "test"), resolve(str(deep)))
    _, spending, _ = spent(deep, uniform.bits_per_weight * 0.999)
    beside = next(check for check in spending.checks if check.name == "uniform 4:64")
    assert beside.weight_bytes == uniform.weight_bytes > spending.budget_bytes
    assert not beside.fits
    assert not beside.chosen
    assert all(check.fits for check in spending.checks if check.weight_bytes <= spending.budget_bytes)
    assert [check.weight_bytes for check in spending.checks if check.chosen] == [spending.weight_bytes]


def test_a_size_counts_whole_files(deep: Path, tmp_path: Path) -> None:
    recipe = budget_recipe({"size": "600KB"}, [FEW])
    plan = next(e.plan for e in allocated_plan(prepare(recipe, resolve(str(deep)))) if isinstance(e, Allocated))
    written(plan, tmp_path / "out")
    assert 0.95 * 600_000 < (tmp_path / "out" / "model.safetensors").stat().st_size <= 600_000


def test_a_second_budget_takes_scores_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    deep, few = llama(tmp_path / "model"), "options=[3, 4, 6]"
    first, _, stages = spent(deep, 4.5, few)
    again, spending, later = spent(deep, 4.5, few)
    assert "scoring" in stages
    assert "scoring" not in later
    assert [d.format for d in again.decisions] == [d.format for d in first.decisions]
    assert spending.text is not None
    *_, other = spent(deep, 4.5, "options=[3, 4, 5, 6]")
    assert "scoring" in other, "an option that was never scored is scored"


def test_rules_come_first(deep: Path) -> None:
    rules = "rules=[{match: v_proj, bits: 8}, {match: lm_head, keep: true}]"
    plan, _, _ = spent(deep, 7.0, rules)
    formats = {d.path: d.format for d in plan.decisions}
    assert all(fmt == Format(8, 64) for path, fmt in formats.items() if path.endswith("v_proj"))
    assert formats["lm_head"] is None
    assert plan.bits_per_weight <= 7.0


def test_a_budget_too_small_says_what_would_do(deep: Path) -> None:
    with pytest.raises(BadInputError, match="smallest options take"):
        spent(deep, 2.0)


@pytest.mark.parametrize(
    "name", ["llama_tied", "qwen3_moe", "deepseek_v2_mla", "deepseek_v3_mla", "gemma3_sliding", "mamba2"]
)
def test_every_kind_of_model_spends_a_budget_and_loads(name: str, tmp_path: Path) -> None:
    config = DEEPSEEK if name == "deepseek_v3_mla" else CONFIGS[name]
    model = save(tmp_path / "model", config, build(config)[1])
    plan, spending, _ = spent(model, 6.5, "options=[3, 8]")
    assert spending.text is not None
    assert plan.bits_per_weight <= 6.5
    written(plan, tmp_path / "out")
    loaded, _ = mlx_lm.load(str(tmp_path / "out"))
    assert bool(mx.isfinite(loaded(mx.array([[3, 4, 5]]))).all())


def test_a_router_keeps_eight_bits_and_a_stack_has_one_format(tmp_path: Path) -> None:
    config = CONFIGS["mixtral"]
    model = save(tmp_path / "model", config, build(config)[1])
    draft = prepare(budget_recipe({"bpw": 6.0}, [FEW]), resolve(str(model)))
    routers = {path: formats for path, formats in allowed_formats(draft).items() if path.endswith(".gate")}
    assert routers
    assert all(fmt.bits >= ROUTER_BITS for formats in routers.values() for fmt in formats)
    plan, _, _ = spent(model, 6.0, "options=[3, 8]")
    found = {d.path: d.format for d in plan.decisions}
    assert all(found[path] is None or found[path].bits == 8 for path in routers)  # type: ignore[union-attr]


def test_without_text_weights_decide(deep: Path, tmp_path: Path) -> None:
    plan, spending, stages = spent(deep, 4.3, "calibration={text: none}")
    assert spending.text is None
    assert stages == []
    assert spending.facts()["predicted_kl"] is None
    assert 0.995 * 4.3 < plan.bits_per_weight <= 4.3
    assert {d.method for d in plan.decisions if d.format} == {"fit"}
    written(plan, tmp_path / "out")


def test_a_budget_is_rebuilt_where_the_model_asks_for_bits(tmp_path: Path) -> None:
    """What was allocated to a router is the 8 bits that the model asks for, so a report names the model there."""
    config = CONFIGS["qwen3_moe"]
    model = save(tmp_path / "model", config, build(config)[1])
    plan, _, _ = spent(model, 6.5, "options=[3, 8]")
    assert any(d.by is By.MODEL and d.path.endswith("mlp.gate") for d in plan.decisions)
    recorded = written(plan, tmp_path / "out").report
    locked = prepare_locked(recorded, resolve(str(model)))
    assert {d.path: d.format for d in locked.decisions} == {d.path: d.format for d in plan.decisions}
    assert locked.spending == plan.spending == recorded["budget"]
    assert locked.recipe == plan.recipe


def test_a_model_that_calibration_cannot_follow_is_scored_by_its_weights(tmp_path: Path) -> None:
    model = save(tmp_path / "model", HUNYUAN, build(HUNYUAN)[1])
    plan, spending, stages = spent(model, 5.0)
    assert (spending.text, stages) == (None, [])
    assert plan.uncalibrated is not None
    assert {d.method for d in plan.decisions if d.format} == {"fit"}
    finished = written(plan, tmp_path / "out")
    assert finished.report["uncalibrated"] == plan.uncalibrated
    assert finished.report["recipe"]["resolved"]["calibration"]["text"] == ["builtin"]


def logits_of(folder: Path, tokens: mx.array) -> mx.array:
    model, _ = mlx_lm.utils.load_model(folder)
    model.set_dtype(mx.float32)
    return model(tokens)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe"])
def test_chosen_weights_lose_less_than_rounded_ones(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = save(tmp_path / "model", config, build(config)[1])
    plan = prepare(recipe_of(method="fit", default={"bits": 3}), resolve(str(model)))
    with streamed_model(plan.source, plan.architecture) as streamed:
        tokens = calibration_text(plan.recipe.calibration, streamed).held_out[0]
    reference = logits_of(model, tokens)
    lost = {}
    for method in ("rtn", "fit", "gptq"):
        keys = {} if method == "rtn" else {"calibration": {"tokens": 4096}}
        recipe = recipe_from_dict({"default": {"bits": 3, "group_size": 64}, "method": method, **keys}, method)
        finished = written(prepare(recipe, resolve(str(model))), tmp_path / method)
        lost[method] = float(divergence(reference, logits_of(tmp_path / method, tokens)).mean())
        recorded = {module["method"] for module in finished.report["modules"] if module["format"]}
        assert method in recorded
    assert lost["gptq"] < 0.8 * min(lost["rtn"], lost["fit"])
    # Random experts are routed by noise; where there are none, a better grid shows in the divergence too.
    assert name == "qwen3_moe" or lost["fit"] < lost["rtn"]


def test_gptq_is_interrupted_continued_and_rebuilt_to_the_same_bytes(deep: Path, tmp_path: Path) -> None:
    plan, _, _ = spent(deep, 4.2)
    whole = written(plan, tmp_path / "whole")
    events: Iterator[Any] = run(plan, tmp_path / "out")
    finished = 0
    for event in events:
        finished += isinstance(event, Written) and event.finished is not None
        if finished == 25:
            break
    events.close()
    continued = written(plan, tmp_path / "out")
    assert compared_files(continued.report, whole.report)[1] == ()
    recorded = read_report(tmp_path / "whole" / "mlxq.json")
    locked = prepare_locked(recorded, resolve(str(deep)))
    *_, rebuilt = run(locked, tmp_path / "rebuilt")
    assert isinstance(rebuilt, Finished)
    assert compared_files(rebuilt.report, recorded)[1] == ()


def test_scores_predict_what_is_measured(deep: Path) -> None:
    """Over random assignments, summed scores and measured KL agree in rank; docs/budgets.md has a trained model's."""
    draft = prepare(budget_recipe({"bpw": 4.5}, [FEW]), resolve(str(deep)))
    options = {path: (Format(3, 64), Format(4, 64), Format(5, 64), Format(6, 64)) for path in allowed_formats(draft)}

    def encoded(path: str, weight: mx.array, fmt: Format, *_: Any) -> mx.array:
        return fmt.decode(round_to_nearest(weight, fmt).arrays())

    with streamed_model(draft.source, draft.architecture) as streamed:
        text = calibration_text(draft.recipe.calibration, streamed)
        found = {
            (s.path, s.fmt): s.divergence
            for s in scores(streamed.sequence, text.batches, options, encoded, streamed.hold)
        }
        chance = random.Random(0)
        assignments = []
        for _ in range(24):
            # Leaning to many or few bits, so that assignments differ in more than luck.
            weights = [chance.random() ** 2 + 0.02 for _ in range(4)]
            assignments.append({path: chance.choices(formats, weights)[0] for path, formats in options.items()})
        *_, measured = measured_divergences(streamed, text.held_out, assignments, encoded)
    assert isinstance(measured, list)
    predicted = [sum(found[item] for item in assignment.items()) for assignment in assignments]
    actual = [float(np.mean(sequences)) for sequences in measured]
    ranks = np.argsort(np.argsort(predicted)), np.argsort(np.argsort(actual))

    assert np.corrcoef(*ranks)[0, 1] > 0.75


def test_the_commands_show_and_explain(deep: Path, tmp_path: Path) -> None:
    quantize = ["quantize", str(deep), "--bpw", "4.5", "--set", FEW]
    shown = CliRunner().invoke(app, [*quantize, "--dry-run", "--explain", "-o", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    for text in ("predicted KL", "by score", "Where the bits went", "The next "):
        assert text in shown.stdout
    assert not (tmp_path / "out").exists()
    plot = tmp_path / "curve.svg"
    curve = CliRunner().invoke(app, [*quantize, "--frontier", "--plot", str(plot), "--json"])
    assert curve.exit_code == 0, curve.output
    facts = json.loads(curve.stdout)
    points = facts["curve"]
    assert facts["schema"] == "mlxq.budget"
    assert [p["predicted_kl"] for p in points] == sorted((p["predicted_kl"] for p in points), reverse=True)
    assert sum(p["measured_kl"] is not None for p in points) == 4
    command = ["quantize", str(deep), "--size", "600KB", "--set", FEW, "-o", str(tmp_path / "s"), "--no-generate"]
    sized = CliRunner().invoke(app, command)
    assert sized.exit_code == 0, sized.output
    assert json.loads((tmp_path / "s" / "mlxq.json").read_text())["budget"]["asked"] == {"size": "600000B"}


def test_what_a_budget_will_be_is_not_guessed(deep: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("budget: {bpw: 4.5}\n")
    looked = CliRunner().invoke(app, ["inspect", str(deep), "--recipe", str(recipe)])
    assert isinstance(looked.exception, BadInputError)
    checked = CliRunner().invoke(app, ["recipes", "check", str(recipe), "--model", str(deep)])
    assert checked.exit_code == 0, checked.output
    assert "its budget decides after" in checked.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bpw", "4", "--size", "1GB"], "two budgets"),
        (["--plot", "curve.svg"], "--frontier"),
        (["--bpw", "nan"], "bpw"),
        (["--size", "many"], "cannot read the size"),
        (["--bpw", "4", "--model", "other"], "two models"),
    ],
)
def test_what_makes_no_sense_is_said(deep: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["quantize", str(deep), *arguments])
    assert isinstance(result.exception, BadInputError)
    assert says in str(result.exception)
