"""Plans: shards, what the model asks for, what never changes dtype, and widths that no group divides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

import mlxq.methods.method
import mlxq.planning.layout
from mlxq.errors import RecipeError
from mlxq.methods.formats import Format
from mlxq.pipeline import prepare
from mlxq.planning.plan import By, Decision, Plan, Stored
from mlxq.recipe.load import load_recipe, recipe_from_dict
from mlxq.sources.resolve import resolve
from mlxq.writing.report import plan_facts
from tests.checkpoints import build, llama, save
from tests.test_bit_identity import SMALL, assert_same_bits, checkpoint, quantize, tensors
from tests.test_foreign import DEEPSEEK, deepseek_weights

GATE = "model.layers.0.mlp.gate"


def plan_of(model: Path, rules: list[dict[str, Any]], **options: Any) -> Plan:
    recipe = recipe_from_dict({"default": {"bits": 4}, "rules": rules, **options}, "test")
    return prepare(recipe, resolve(str(model)))


def decision(plan: Plan, path: str) -> Decision:
    return plan.by_path[path]


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_many_shards_hold_what_one_file_holds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path / "model", name)
    quantize(model, tmp_path / "one", load_recipe("4bit"))
    monkeypatch.setattr(mlxq.planning.layout, "SHARD_BYTES", 30_000)
    plan = prepare(load_recipe("4bit"), resolve(str(model)))
    quantize(model, tmp_path / "many", load_recipe("4bit"))
    files = sorted((tmp_path / "many").glob("model*.safetensors"))
    assert len(files) > 3
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert [f.stat().st_size for f in files] == [shard.nbytes for shard in plan.shards]
    largest = max(sum(spec.nbytes for spec in step.outputs) for step in plan.steps)
    assert all(shard.nbytes - len(shard.header) <= max(30_000, largest) for shard in plan.shards)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in sorted(mx.load(str(file)))}
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors(tmp_path / "many").values())
    assert_same_bits(tmp_path / "one", tmp_path / "many")
    ids = mx.array([[3, 4, 5]])
    one, many = (mlx_lm.load(str(tmp_path / folder))[0](ids) for folder in ("one", "many"))
    assert mx.array_equal(one, many).item()


def test_what_must_keep_its_dtype_keeps_it(tmp_path: Path) -> None:
    weights = deepseek_weights()
    kept = "model.layers.1.mlp.gate.e_score_correction_bias"
    weights[kept] = mx.array([1.0001, 2.0002, 3.0003, 4.0004])
    model = save(tmp_path / "model", DEEPSEEK, weights)
    recipe = recipe_from_dict({"dtype": "float16", "default": {"bits": 4}}, "test")
    quantize(model, tmp_path / "ours", recipe)
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64, dtype="float16")
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")
    written = tensors(tmp_path / "ours")
    assert mx.array_equal(written[kept], weights[kept]).item()
    assert written["model.norm.weight"].dtype == mx.float16


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], Format(8, 64)),
        ([{"match": "*", "bits": 3}], Format(8, 64)),
        ([{"match": "re:.*gate.*", "bits": 2}], Format(8, 64)),
        ([{"match": "*.gate*", "bits": 3}], Format(8, 64)),
        ([{"match": "*", "mode": "mxfp4"}], Format(8, 64)),
        ([{"match": "*", "bits": 8, "group_size": 32}], Format(8, 64)),
        ([{"match": "mlp.gate", "bits": 4}], Format(4, 64)),
        ([{"match": "*.mlp.gate", "bits": 4, "group_size": 32}], Format(4, 32)),
        ([{"match": GATE, "bits": 6}], Format(6, 64)),
        ([{"match": "mlp.gate", "keep": True}], None),
        ([{"match": "*", "keep": True}], None),
    ],
)
def test_only_a_rule_that_names_a_router_goes_below_what_the_model_asks(
    rules: list[dict[str, Any]], expected: Format | None, tmp_path: Path
) -> None:
    plan = plan_of(checkpoint(tmp_path / "model", "qwen3_moe"), rules)
    found = decision(plan, GATE)
    assert found.format == expected
    assert found.asked == "8:64"
    assert (found.by is By.MODEL) == (expected == Format(8, 64))


@pytest.mark.parametrize(
    ("match", "expected"), [("*", None), ("re:.*g_proj", None), ("*.g_*", None), ("g_proj", Format(8, 64))]
)
def test_what_the_model_wants_left_alone_is_quantized_only_by_name(
    match: str, expected: Format | None, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "model", "spark2_5_asks_to_leave_alone")
    found = decision(plan_of(model, [{"match": match, "bits": 8}]), "model.layers.0.self_attn.g_proj")
    assert found.format == expected
    assert found.asked == "not quantized"


def test_a_width_that_no_group_divides(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", intermediate_size=160)
    plan = plan_of(model, [{"match": "up_proj", "group_size": 128, "bits": 4}])
    down = decision(plan, "model.layers.0.mlp.down_proj")
    assert down.format == Format(4, 32)
    assert down.misfit
    assert "160" in str(down.note)
    assert [d.path for d in plan.decisions if d.misfit] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    with pytest.raises(RecipeError) as caught:
        plan_of(model, [], strict=True)
    assert len(caught.value.faults) == 2
    kept = plan_of(llama(tmp_path / "odd", intermediate_size=144), [])
    assert decision(kept, "model.layers.0.mlp.down_proj").format is None
    assert decision(kept, "model.layers.0.mlp.down_proj").misfit
    assert kept.config["quantization"]["model.layers.0.mlp.down_proj"] is False


def test_a_tied_head_named_in_strict_mode_is_no_misfit(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", tie_word_embeddings=True)
    plan = plan_of(model, [{"match": "lm_head", "bits": 6}], strict=True)
    found = decision(plan, "model.embed_tokens")
    assert found.format == Format(6, 64)
    assert found.note
    assert not found.misfit


HUNYUAN: dict[str, Any] = {
    **SMALL, "model_type": "hunyuan", "attention_bias": False, "moe_topk": 1, "num_experts": 1, "num_shared_expert": 1,
    "use_mixed_mlp_moe": False, "use_qk_norm": True, "use_cla": True, "cla_share_factor": 2,
    "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
}  # fmt: skip


@pytest.mark.parametrize("keys", [{"method": "gptq", "default": {"bits": 4}}, {"method": "rtn", "budget": {"bpw": 5}}])
def test_a_calibration_that_cannot_be_used_is_said_beside_the_recipe(keys: dict[str, Any], tmp_path: Path) -> None:
    """Blocks of Hunyuan hand on keys and values beside their output, so calibration cannot follow them."""
    model = save(tmp_path / "model", HUNYUAN, build(HUNYUAN)[1])
    recipe = recipe_from_dict({**keys, "calibration": {"tokens": 2048}}, "test")
    plan = prepare(recipe, resolve(str(model)))
    assert plan.recipe == recipe
    assert not plan.calibration.has_text
    assert plan.uncalibrated is not None
    assert plan.uncalibrated in plan.notes[0]
    assert not any(step.guided for step in plan.steps)
    facts = plan_facts(plan)
    assert facts["recipe"]["resolved"]["calibration"] == {"text": ["builtin"], "tokens": 2048}
    assert facts["uncalibrated"] == plan.uncalibrated
    if recipe.budget is None:
        assert {d.method for d in plan.decisions} == {"fit"}


def test_a_calibration_that_can_be_used_is(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", tie_word_embeddings=False)
    plan = plan_of(model, [{"match": "down_proj", "mode": "mxfp4"}], method="gptq")
    assert (plan.uncalibrated, plan.remarks, plan.calibration) == (None, (), plan.recipe.calibration)
    found = {d.path.removeprefix("model.layers.0."): (d.method, d.guided) for d in plan.decisions}
    assert found["self_attn.q_proj"] == found["lm_head"] == ("gptq", True)
    assert found["mlp.down_proj"] == ("fit", True)
    # It only looks rows up: there are no inputs that text could tell of.
    assert found["model.embed_tokens"] == ("fit", False)
    tied = plan_of(llama(tmp_path / "tied", tie_word_embeddings=True), [], method="gptq").by_path["model.embed_tokens"]
    assert (tied.method, tied.guided) == ("gptq", True)
    silent = plan_of(model, [], method="fit", calibration={"text": "none"})
    assert {(d.method, d.guided) for d in silent.decisions} == {("fit", False)}


def test_experts_whose_hessians_would_not_fit_are_fitted_and_the_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "model", "qwen3_moe")
    stack = "model.layers.0.mlp.switch_mlp.up_proj"
    assert plan_of(model, [], method="gptq").by_path[stack].method == "gptq"
    monkeypatch.setattr(mlxq.methods.method, "HESSIAN_BYTES", 4 * 128**2 * 4)
    plan = plan_of(model, [], method="gptq")
    assert (plan.by_path[stack].method, plan.by_path[stack].guided) == ("fit", True)
    assert plan.by_path["model.layers.0.self_attn.q_proj"].method == "gptq"


def test_who_decided_is_a_rule_by_its_place_or_one_of_few(tmp_path: Path) -> None:
    plan = plan_of(
        checkpoint(tmp_path / "model", "qwen3_moe"), [{"match": "q_proj", "bits": 8}, {"match": "*", "bits": 3}]
    )
    by = {path: plan.by_path[f"model.layers.0.{path}"] for path in ("self_attn.q_proj", "mlp.gate")}
    assert (by["self_attn.q_proj"].by, by["self_attn.q_proj"].decided_by) == (By.RULE, "test rules[0]")
    assert (by["mlp.gate"].by, by["mlp.gate"].decided_by) == (By.MODEL, "the model asks for it")
    assert decision(plan_of(tmp_path / "model", []), "lm_head").decided_by == "default"
    written = {module["path"]: module["decided_by"] for module in plan_facts(plan)["modules"]}
    assert written == {d.path: d.decided_by for d in plan.decisions}


@pytest.mark.parametrize("stored", Stored)
def test_options_are_read_back_from_a_report(stored: Stored, tmp_path: Path) -> None:
    plan = replace(plan_of(checkpoint(tmp_path / "model", "qwen3_moe"), []), stored=stored)
    assert set(plan.options) == {"requantize", "dequantize", "keep_quantization", "trust_remote_code"}
    assert Stored.recorded(plan.options) is stored
    assert sum(plan.options.values()) == (stored is not Stored.AS_IS)


@pytest.mark.parametrize("recipe", ["4bit", "moe", "mxfp4"])
def test_every_decision_counts_the_bytes_it_writes(recipe: str, tmp_path: Path) -> None:
    plan = prepare(load_recipe(recipe), resolve(str(checkpoint(tmp_path / "model", "qwen3_moe"))))
    for each in plan.decisions:
        outputs = [spec for step in plan.steps if step.path == f"{each.path}.weight" for spec in step.outputs]
        assert each.nbytes == sum(spec.nbytes for spec in outputs)
    quantize(tmp_path / "model", tmp_path / "out", load_recipe(recipe))
    again = prepare(recipe_from_dict({}, "mlx"), resolve(str(tmp_path / "out")))
    assert {d.path: d.nbytes for d in again.decisions} == {d.path: d.nbytes for d in plan.decisions}
    assert {d.by for d in again.decisions if d.format} == {By.SOURCE}
