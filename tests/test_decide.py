"""Decisions, and what they come to in ``config.json``, headers and counts: all before a weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import mlxq.planning.layout
from mlxq.errors import BadInputError, RecipeError
from mlxq.methods.formats import Format
from mlxq.pipeline import prepare, run
from mlxq.planning.layout import config_text
from mlxq.planning.plan import By, Plan, Stored
from mlxq.recipe.load import recipe_from_dict
from mlxq.sources.resolve import resolve
from tests.checkpoints import llama

FOUR, EIGHT = Format(4, 64), Format(8, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("decide") / "model", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decide") / "quantized"
    rules = [{"match": "v_proj", "keep": True}, {"match": "o_proj", "bits": 8}]
    list(run(planned(model, default={"bits": 4}, rules=rules), out))
    return out


def planned(model: Path, stored: Stored = Stored.AS_IS, **recipe: Any) -> Plan:
    return prepare(recipe_from_dict(recipe, "test"), resolve(str(model)), stored)


Q0 = "model.layers.0.self_attn.q_proj"


def test_the_last_rule_or_the_first_decides_and_the_others_are_named(model: Path) -> None:
    rules = [{"match": "q_proj", "bits": 8}, {"match": "model.layers.0.*", "bits": 6}, {"match": "*", "keep": True}]
    plan = planned(model, default={"bits": 4}, rules=rules)
    found = plan.by_path[Q0]
    assert (found.by, found.where, found.format) == (By.RULE, "test rules[0]", EIGHT)
    assert found.also == ("test rules[1]", "test rules[2]")
    rest = plan.by_path["model.layers.1.mlp.up_proj"]
    assert (rest.by, rest.where, rest.format, rest.also) == (By.RULE, "test rules[2]", None, ())
    assert rest.dtype == "BF16"
    assert rest.nbytes == math.prod(rest.shape) * 2


def test_what_no_rule_names_has_the_default_or_stays(model: Path) -> None:
    found = planned(model, default={"bits": 4}).by_path[Q0]
    assert (found.by, found.where, found.format, found.also) == (By.DEFAULT, None, FOUR, ())
    assert (found.note, found.misfit, found.asked, found.quantizable) == (None, False, None, True)
    assert found.nbytes == math.prod(found.shape) * 4.5 / 8
    kept = planned(model).by_path[Q0]
    assert (kept.by, kept.format, kept.method, kept.guided) == (By.DEFAULT, None, "rtn", False)


def test_a_rule_for_the_head_reaches_the_embedding_it_is_tied_to_and_says_so(model: Path) -> None:
    plan = planned(model, default={"bits": 4}, rules=[{"match": "lm_head", "bits": 8}])
    head = plan.by_path["model.embed_tokens"]
    assert head.format == EIGHT
    assert head.note == "the head is tied to this embedding, so the rule for lm_head applies here"
    assert [d.path for d in plan.decisions if d.note] == ["model.embed_tokens"]
    both = planned(model, rules=[{"match": ["lm_head", "embed_tokens"], "bits": 8}]).by_path["model.embed_tokens"]
    assert (both.format, both.note) == (EIGHT, None)


def test_a_rule_that_means_nothing_is_refused(model: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(model, rules=[{"match": "nothing_of_this_name", "bits": 4}])
    assert len(caught.value.faults) == 1
    assert caught.value.hint == "mlxq inspect MODEL --layers lists every module path."


def test_a_width_says_what_it_missed(tmp_path: Path) -> None:
    odd = llama(tmp_path / "odd", intermediate_size=160)
    down = planned(odd, default={"bits": 4, "group_size": 64}).by_path["model.layers.0.mlp.down_proj"]
    assert (down.format, down.misfit) == (Format(4, 32), True)
    assert down.note == "its width 160 is no multiple of 64; group size 32 instead"
    assert down.by is By.DEFAULT
    none = llama(tmp_path / "none", intermediate_size=144)
    down = planned(none, default={"bits": 4, "group_size": 64}).by_path["model.layers.0.mlp.down_proj"]
    assert (down.format, down.misfit) == (None, True)
    assert down.note == "its width 144 is no multiple of any group size of affine; kept in bfloat16"
    with pytest.raises(RecipeError) as caught:
        planned(none, default={"bits": 4, "group_size": 64}, strict=True)
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        f"model.layers.{i}.mlp.down_proj" for i in (0, 1)
    ]
    assert "strict: true forbids this" in str(caught.value.hint)
    named = [{"match": "down_proj", "keep": True}]
    assert planned(none, default={"bits": 4, "group_size": 64}, strict=True, rules=named).by_path


def test_what_is_stored_quantized_stays_and_counts_what_it_holds(quantized: Path, model: Path) -> None:
    plan = planned(quantized)
    made = planned(
        model, default={"bits": 4}, rules=[{"match": "v_proj", "keep": True}, {"match": "o_proj", "bits": 8}]
    )
    assert {d.path: (d.format, d.nbytes) for d in plan.decisions} == {
        d.path: (d.format, d.nbytes) for d in made.decisions
    }
    assert {d.by for d in plan.decisions if d.format} == {By.SOURCE}
    assert {d.method for d in plan.decisions} == {"rtn"}
    assert {d.dtype for d in plan.decisions} == {"BF16"}
    assert plan.parameter_count == made.parameter_count == planned(model).parameter_count
    assert plan.config["quantization"] == made.config["quantization"]
    assert not any(step.dequantize or step.format for step in plan.steps)
    assert plan.weight_bytes == made.weight_bytes


def test_what_is_stored_quantized_is_opened_where_that_is_asked(quantized: Path, model: Path) -> None:
    plain, opened = planned(model), planned(quantized, Stored.DEQUANTIZE)
    assert {s.path: s.spec for s in opened.steps} == {s.path: s.spec for s in plain.steps}
    assert "quantization" not in opened.config
    was = {d.path for d in planned(quantized).decisions if d.format}
    assert {s.path.removesuffix(".weight") for s in opened.steps if s.dequantize} == was
    assert all((s.source is None) == s.dequantize for s in opened.steps)
    again = planned(quantized, Stored.REQUANTIZE, default={"bits": 8})
    assert {d.format for d in again.decisions} == {EIGHT}
    assert {d.by for d in again.decisions} == {By.DEFAULT}
    with pytest.raises(BadInputError, match="already quantized"):
        planned(quantized, default={"bits": 8})


def test_config_names_every_deviation_in_full(model: Path) -> None:
    rules = [{"match": "q_proj", "bits": 8}, {"match": "k_proj", "keep": True}, {"match": "v_proj", "mode": "mxfp4"}]
    config = planned(model, default={"bits": 4}, rules=rules).config
    found = config["quantization"]
    assert config["quantization_config"] == found
    assert {key: found[key] for key in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
    }
    assert {key: value for key, value in found.items() if "." in key} == {
        **{f"model.layers.{i}.self_attn.q_proj": {"bits": 8, "group_size": 64, "mode": "affine"} for i in (0, 1)},
        **{f"model.layers.{i}.self_attn.k_proj": False for i in (0, 1)},
        **{f"model.layers.{i}.self_attn.v_proj": {"bits": 4, "group_size": 32, "mode": "mxfp4"} for i in (0, 1)},
    }
    assert list(config) == sorted(config)


def test_the_top_level_is_the_commonest_format_where_no_default_is_in_use(model: Path) -> None:
    rules = [{"match": "q_proj", "bits": 8}, {"match": "*.mlp.*", "bits": 3}]
    found = planned(model, rules=rules).config["quantization"]
    assert found["bits"] == 3
    assert found[Q0] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert found["model.embed_tokens"] is False
    assert "quantization" not in planned(model).config


def test_a_dtype_is_written_where_the_config_has_one(model: Path, tmp_path: Path) -> None:
    plan = planned(model, dtype="float16")
    assert plan.config["torch_dtype"] == "float16"
    assert "dtype" not in plan.config
    assert {step.spec.dtype for step in plan.steps} == {"F16"}
    assert planned(model).config["torch_dtype"] == "bfloat16"
    newer = planned(llama(tmp_path / "newer", dtype="bfloat16"), dtype="float16").config
    assert newer["dtype"] == newer["torch_dtype"] == "float16"


def test_parameters_are_counted_as_numbers(model: Path) -> None:
    plan = planned(model)
    assert plan.parameter_count == sum(math.prod(p.spec.shape) for p in plan.architecture.parameters)


def test_shards_are_filled_in_order_to_the_byte(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(model, default={"bits": 4})
    sizes = [sum(spec.nbytes for spec in step.outputs) for step in whole.steps]
    assert [shard.file for shard in whole.shards] == ["model.safetensors"]
    monkeypatch.setattr(mlxq.planning.layout, "SHARD_BYTES", sum(sizes[:4]))
    exact = planned(model, default={"bits": 4}).shards
    assert set(exact[0].offsets) == {spec.name for step in whole.steps[:4] for spec in step.outputs}
    monkeypatch.setattr(mlxq.planning.layout, "SHARD_BYTES", sum(sizes[:4]) - 1)
    less = planned(model, default={"bits": 4}).shards
    assert set(less[0].offsets) == {spec.name for step in whole.steps[:3] for spec in step.outputs}
    count = len(less)
    assert [shard.file for shard in less] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = [name for shard in less for name in shard.offsets]
    assert sorted(names) == sorted(spec.name for step in whole.steps for spec in step.outputs)
    monkeypatch.setattr(mlxq.planning.layout, "SHARD_BYTES", 1)
    assert len(planned(model, default={"bits": 4}).shards) == len(sizes), "a tensor is never cut"


def test_tensors_lie_side_by_side_widest_dtype_first(model: Path) -> None:
    plan = planned(model, default={"bits": 4}, rules=[{"match": "v_proj", "mode": "mxfp4"}])
    specs = {spec.name: spec for step in plan.steps for spec in step.outputs}
    (shard,) = plan.shards
    at = len(shard.header)
    widths = []
    for name, offset in shard.offsets.items():
        assert offset == at
        at += specs[name].nbytes
        widths.append(specs[name].nbytes // specs[name].size)
    assert at == shard.nbytes
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {4, 2, 1}
    header = json.loads(shard.header[8:])
    assert header["__metadata__"] == {"format": "mlx"}
    assert set(header) - {"__metadata__"} == set(specs)


def test_floats_that_json_lacks_are_tagged() -> None:
    config = {"a": math.inf, "b": [-math.inf, {"c": math.nan}], "d": (1.5, "x"), "e": None, "f": True}
    text = config_text(config)
    assert text.endswith("}\n")
    assert "\n    " in text
    assert json.loads(text) == {
        "a": {"__float__": "Infinity"},
        "b": [{"__float__": "-Infinity"}, {"c": {"__float__": "NaN"}}],
        "d": [1.5, "x"],
        "e": None,
        "f": True,
    }


def test_a_plan_reads_each_parameter_once_in_the_models_order(model: Path) -> None:
    plan = planned(model, default={"bits": 4})
    assert [step.path for step in plan.steps] == [p.spec.name for p in plan.architecture.parameters]
    for step in plan.steps:
        module = step.path.rpartition(".")[0]
        decision = plan.by_path.get(module) if step.path.endswith(".weight") else None
        assert step.format == (decision.format if decision else None)
        assert step.source == next(p.source for p in plan.architecture.parameters if p.spec.name == step.path)
        assert (step.dequantize, step.repacked, step.guided) == (False, False, False)
        assert [spec.name.rpartition(".")[2] for spec in step.outputs] == (
            ["weight", "scales", "biases"] if step.format else [step.path.rpartition(".")[2]]
        )
