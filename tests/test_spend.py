"""How a budget is spent, step by step: what may be chosen, what fits, what is scored on what, and what is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlxq.budget.scoring
import mlxq.budget.spend
import mlxq.calibration.cache
import mlxq.calibration.tokens
from mlxq.architecture.kv_cache import activation_bytes, kv_cache_bytes
from mlxq.budget.allocate import allocate
from mlxq.budget.scoring import ROUTER_BITS, SCORE_TOKENS, Scoring, allowed_formats, module_bytes
from mlxq.budget.spend import CURVE_POINTS, MEASURED_POINTS, Spending, budget_bytes, next_bytes, spend
from mlxq.calibration import sensitivity
from mlxq.calibration.cache import ScoreCache, scores_key
from mlxq.calibration.measured import measured_divergences
from mlxq.calibration.streamed import streamed_model
from mlxq.calibration.tokens import HELD_OUT_TOKENS, HOLD_OUT_EVERY, SEQUENCE_TOKENS, calibration_text
from mlxq.errors import BadInputError
from mlxq.machine.devices import find_device
from mlxq.machine.memory import weight_room
from mlxq.methods.formats import Format
from mlxq.pipeline import prepare
from mlxq.planning.plan import Plan
from mlxq.recipe.load import budget_recipe, recipe_from_dict
from mlxq.sources.resolve import resolve
from tests.architectures import CONFIGS
from tests.checkpoints import build, llama, save

FEW = "calibration={tokens: 2048}"
THREE, SIX = Format(3, 64), Format(6, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("spend") / "model", num_hidden_layers=1)


def draft_of(model: Path, budget: dict[str, Any], *sets: str) -> Plan:
    return prepare(budget_recipe(budget, [FEW, "options=[3, 6]", *sets]), resolve(str(model)))


class Seen:
    """What text was scored on, and what was measured on."""

    def __init__(self) -> None:
        self.scored: list[mx.array] = []
        self.measured: list[mx.array] = []


def sequences(batches: Sequence[mx.array]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in np.array(batch).tolist()]


Whole = tuple[Plan, Spending, list[Scoring], Seen]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A budget spent with its curve measured, every event, and the text that each step was shown."""
    seen = Seen()

    def scores(sequence: Any, batches: Any, *rest: Any) -> Any:
        seen.scored.extend(batches)
        return sensitivity.scores(sequence, batches, *rest)

    def measured(streamed: Any, batches: Any, *rest: Any) -> Any:
        seen.measured.extend(batches)
        return measured_divergences(streamed, batches, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Two sequences to check on are enough to see that it is done, and quick.
        patch.setattr(mlxq.calibration.tokens, "HELD_OUT_TOKENS", 2 * SEQUENCE_TOKENS)
        patch.setattr(mlxq.budget.scoring, "scores", scores)
        patch.setattr(mlxq.budget.spend, "measured_divergences", measured)
        draft = draft_of(model, {"bpw": 5.0})
        same = dict.fromkeys(allowed_formats(draft), THREE)
        events = list(spend(draft, {"all at three": same}, measure_curve=True))
    *progress, spending = events
    assert isinstance(spending, Spending)
    return draft, spending, [event for event in progress if isinstance(event, Scoring)], seen


def test_progress_counts_every_score_and_every_block(whole: Whole) -> None:
    draft, _, progress, _ = whole
    options = sum(len(formats) for formats in allowed_formats(draft).values())
    found: dict[str, list[tuple[int, int]]] = {}
    for event in progress:
        found.setdefault(event.stage, []).append((event.done, event.total))
    assert found == {
        "scoring": [(done, options) for done in range(options + 1)],
        "checking": [(1, 1)],
        "measuring the curve": [(1, 1)],
    }


def test_what_is_measured_never_saw_calibration(whole: Whole) -> None:
    _, spending, _, seen = whole
    scored, measured = set(sequences(seen.scored)), set(sequences(seen.measured))
    assert scored
    assert measured
    assert not scored & measured
    assert sum(batch.size for batch in seen.scored) <= SCORE_TOKENS
    assert sum(map(len, seen.measured)) == 2 * len(measured), "the check and the curve stand on the held-out text"
    assert spending.text is not None


def test_every_option_has_its_bytes_and_its_score(whole: Whole) -> None:
    draft, spending, _, _ = whole
    assert set(spending.options) == set(allowed_formats(draft))
    for path, options in spending.options.items():
        assert [option.fmt for option in options] == [THREE, SIX, None]
        assert [option.nbytes for option in options] == [module_bytes(draft, path, each.fmt) for each in options]
        assert options[0].divergence > options[1].divergence > options[2].divergence == 0.0


def test_the_parts_of_a_spending_add_up(whole: Whole) -> None:
    draft, spending, _, _ = whole
    free = spending.budget_bytes - spending.fixed_bytes
    assert spending.budget == draft.recipe.budget
    assert spending.budget_bytes == int(5.0 * draft.parameter_count / 8)
    assert spending.parameter_count == draft.parameter_count
    decided = sum(module_bytes(draft, path, None) for path in spending.options)
    assert spending.fixed_bytes == draft.weight_bytes - decided
    assert spending.allocation.nbytes <= free
    assert spending.allocation.bound == pytest.approx(allocate(spending.options, free).bound)
    assert spending.weight_bytes == spending.fixed_bytes + spending.allocation.nbytes <= spending.budget_bytes
    chosen = {path: option for path, each in spending.options.items() for option in each}
    assert set(spending.allocation.formats) == set(chosen)
    assert spending.seconds > 0
    more = next_bytes(spending, 10_000)
    assert spending.allocation.nbytes < more.nbytes <= free + 10_000
    assert more.formats == allocate(spending.options, free + 10_000).formats


def test_checks_say_what_was_measured_of_what(whole: Whole) -> None:
    draft, spending, _, _ = whole
    assert spending.checks[0].name == "by score"
    assert sum(check.chosen for check in spending.checks) == 1
    assert all(check.fits == (check.weight_bytes <= spending.budget_bytes) for check in spending.checks)
    three = next(check for check in spending.checks if check.name == "uniform 3:64")
    uniform = prepare(
        recipe_from_dict({"default": {"bits": 3, "group_size": 64}}, "test"),
        resolve(str(draft.source.weights_folder)),
    )
    assert three.weight_bytes == uniform.weight_bytes
    assert not any(check.name == "all at three" for check in spending.checks), "it is the uniform one"
    assert three.kl_mean > spending.checks[0].kl_mean > 0
    assert all(0 <= check.kl_mean_se < check.kl_mean for check in spending.checks)


def test_the_curve_runs_from_the_smallest_to_the_most_bits(whole: Whole) -> None:
    draft, spending, _, _ = whole
    sizes = [point.weight_bytes for point in spending.curve]
    least = spending.fixed_bytes + sum(each[0].nbytes for each in spending.options.values())
    most = spending.fixed_bytes + sum(each[1].nbytes for each in spending.options.values())
    assert len(sizes) == CURVE_POINTS
    assert sizes[0] == least
    assert sizes[-1] == most
    assert sizes == sorted(sizes)
    even = [least + (most - least) * i / (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    assert all(size <= at and size > at - 0.1 * (most - least) for size, at in zip(sizes, even, strict=True))
    assert all(p.bits_per_weight == p.weight_bytes * 8 / draft.parameter_count for p in spending.curve)
    assert spending.curve[-1].predicted_kl == pytest.approx(sum(e[1].divergence for e in spending.options.values()))


def test_four_points_of_the_curve_are_measured_both_ends_among_them(whole: Whole) -> None:
    _, spending, _, _ = whole
    measured = [i for i, point in enumerate(spending.curve) if point.measured_kl is not None]
    assert measured == [i * (CURVE_POINTS - 1) // (MEASURED_POINTS - 1) for i in range(MEASURED_POINTS)]
    kl = [point.measured_kl for point in spending.curve if point.measured_kl is not None]
    assert kl == sorted(kl, reverse=True)
    assert all((p.measured_kl is None) == (p.measured_kl_se is None) for p in spending.curve)
    # The smallest assignment is the uniform one that the check measured, on the same text.
    assert kl[0] == pytest.approx(next(c.kl_mean for c in spending.checks if c.name == "uniform 3:64"), rel=1e-4)


def test_facts_are_what_was_found(whole: Whole) -> None:
    _, spending, _, _ = whole
    facts = spending.facts()
    assert spending.text is not None
    assert facts["asked"] == {"bpw": 5.0}
    assert facts["budget_bytes"] == spending.budget_bytes
    assert facts["weight_bytes"] == spending.weight_bytes
    assert facts["predicted_kl"] == spending.allocation.divergence > 0
    assert facts["optimality_gap"] == spending.allocation.gap
    assert facts["text"] == spending.text.facts()
    assert json.loads(json.dumps(facts)) == facts, "what a report reads back is what it wrote"
    assert len(facts["checks"]) == len(spending.checks)
    assert len(facts["curve"]) == CURVE_POINTS


def test_without_text_scores_are_relative_squared_errors(model: Path) -> None:
    draft = draft_of(model, {"bpw": 5.0}, "calibration={text: none}", "method=rtn")
    (spending,) = spend(draft, {})
    assert isinstance(spending, Spending)
    assert (spending.text, spending.checks) == (None, ())
    assert spending.facts()["predicted_kl"] is None
    assert spending.allocation == allocate(spending.options, spending.budget_bytes - spending.fixed_bytes)
    stored: Any = mx.load(str(next(model.glob("*.safetensors"))))
    weight = stored["model.layers.0.mlp.up_proj.weight"].astype(mx.float32)
    scales = mx.quantize(weight.astype(mx.bfloat16), 64, 3)
    error = mx.dequantize(*scales, 64, 3).astype(mx.float32) - weight
    found = spending.options["model.layers.0.mlp.up_proj"][0].divergence
    assert found == pytest.approx(float((error**2).sum() / (weight**2).sum()), rel=0.02)


def test_bits_per_weight_count_all_that_is_written(model: Path) -> None:
    draft = draft_of(model, {"bpw": 4.5})
    assert draft.recipe.budget is not None
    assert budget_bytes(draft, draft.recipe.budget) == int(4.5 * draft.parameter_count / 8)


def test_a_size_leaves_room_for_the_headers_of_what_is_written(model: Path) -> None:
    draft = draft_of(model, {"size": "600KB"})
    assert draft.recipe.budget is not None
    reserved = 600_000 - budget_bytes(draft, draft.recipe.budget)
    quantized = prepare(recipe_from_dict({"default": {"bits": 4}}, "test"), resolve(str(model)))
    header = quantized.file_bytes - quantized.weight_bytes
    assert draft.file_bytes - draft.weight_bytes < header <= reserved
    assert reserved < header + 400 * len(quantized.decisions)
    fixed = draft_of(model, {"size": "600KB"}, "rules=[{match: v_proj, bits: 8}]")
    assert fixed.recipe.budget is not None
    more = budget_bytes(fixed, fixed.recipe.budget)
    assert more != budget_bytes(draft, draft.recipe.budget), "what a rule decides has its helpers in the draft already"


def test_a_device_leaves_what_its_memory_does_beside_cache_and_work(model: Path) -> None:
    recipe = recipe_from_dict({"budget": {"fits": {"device": "iphone-8gb", "context": 1000}}}, "test")
    draft, budget = prepare(recipe, resolve(str(model))), recipe.budget
    assert budget is not None
    assert budget.context == 1000
    config = draft.source.config
    cache, work = kv_cache_bytes(config, 1000), activation_bytes(config, 1000)
    left = weight_room(find_device("iphone-8gb"), kv_cache_bytes=cache, activation_bytes=work)
    reserved = 600_000 - budget_bytes(draft, replace(budget, device=None, size_bytes=600_000))
    assert budget_bytes(draft, budget) == left - reserved


def test_the_smallest_options_must_fit(model: Path) -> None:
    draft = draft_of(model, {"bpw": 3.0}, "calibration={text: none}")
    formats = allowed_formats(draft)
    fixed = draft.weight_bytes - sum(module_bytes(draft, path, None) for path in formats)
    least = fixed + sum(module_bytes(draft, path, THREE) for path in formats)
    with pytest.raises(
        BadInputError, match=rf"take {least / 1e6:,.1f} MB \({least * 8 / draft.parameter_count:.2f} bits"
    ):
        next(spend(draft, {}))
    exact = least * 8 / draft.parameter_count
    (spending,) = spend(draft_of(model, {"bpw": exact + 1e-9}, "calibration={text: none}"), {})
    assert isinstance(spending, Spending)
    assert spending.weight_bytes == least


def test_a_budget_that_has_nothing_to_decide_is_refused(model: Path) -> None:
    with pytest.raises(BadInputError, match="nothing to decide"):
        next(spend(draft_of(model, {"bpw": 5.0}, "rules=[{match: '*', bits: 4}]"), {}))


def test_what_may_be_chosen(tmp_path: Path) -> None:
    """Never below what the model asks, a router not below eight bits, a width not in groups that miss it."""
    config = CONFIGS["mixtral"]
    experts = draft_of(save(tmp_path / "experts", config, build(config)[1]), {"bpw": 6.0}, "options=[3, 6, 8]")
    found = allowed_formats(experts)
    assert ROUTER_BITS == 8
    gates = [formats for path, formats in found.items() if path.endswith(".gate")]
    assert gates
    assert all(formats == (Format(8, 64),) for formats in gates)
    assert found["model.layers.0.self_attn.q_proj"] == (THREE, SIX, Format(8, 64))
    odd = draft_of(llama(tmp_path / "odd", intermediate_size=160), {"bpw": 5.0}, "rules=[{match: v_proj, bits: 4}]")
    found = allowed_formats(odd)
    assert found["model.layers.0.mlp.down_proj"] == (Format(3, 32), Format(6, 32))
    assert not any(path.endswith("v_proj") for path in found), "a rule decides it"
    config = CONFIGS["qwen3_moe"]
    asked = draft_of(save(tmp_path / "asked", config, build(config)[1]), {"bpw": 6.0}, "options=[3, 6]")
    assert {f for p, f in allowed_formats(asked).items() if p.endswith("mlp.gate")} == {(Format(8, 64),)}


@pytest.mark.parametrize(("tokens", "kept"), [(2048, 4), (1024, 2), (10**6, None)])
def test_every_sixth_sequence_is_held_out_and_the_others_calibrate(
    model: Path, tokens: int, kept: int | None, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    letters = np.random.default_rng(4).integers(0, 26, 40 * SEQUENCE_TOKENS)
    text.write_text("".join(chr(65 + each) for each in letters))
    draft = draft_of(model, {"bpw": 5.0}, f"calibration={{text: {text}, tokens: {tokens}}}")
    with streamed_model(draft.source, draft.architecture) as streamed:
        found = calibration_text(draft.calibration, streamed)
    calibrate, held = sequences(found.batches), sequences(found.held_out)
    assert all(len(row) == SEQUENCE_TOKENS for row in (*calibrate, *held))
    assert not set(calibrate) & set(held)
    assert sum(map(len, held)) <= HELD_OUT_TOKENS
    if kept is not None:
        assert len(calibrate) == kept
        assert held
        return
    assert len(held) == (len(held) + len(calibrate)) // HOLD_OUT_EVERY
    # In the order of the text, what is held out comes after every five that calibrate.
    order = {row[1:9]: index for index, row in enumerate(calibrate)}
    assert len(order) == len(calibrate)


def test_the_cache_key_names_all_that_scores_depend_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = draft_of(model, {"bpw": 5.0})
    keys = {
        "": scores_key(draft, "a", 100),
        "text": scores_key(draft, "b", 100),
        "tokens": scores_key(draft, "a", 101),
        "method": scores_key(draft_of(model, {"bpw": 5.0}, "method=rtn"), "a", 100),
        "dtype": scores_key(draft_of(model, {"bpw": 5.0}, "dtype=float16"), "a", 100),
        "weights": scores_key(draft_of(llama(tmp_path / "other"), {"bpw": 5.0}), "a", 100),
    }
    monkeypatch.setattr(mlxq.calibration.cache, "SCORES_VERSION", -1)
    keys["version"] = scores_key(draft, "a", 100)
    monkeypatch.undo()
    assert len(set(keys.values())) == len(keys)
    # Neither the budget nor the bits on offer change the score of a module in a format.
    assert scores_key(draft_of(model, {"bpw": 4.0}, "options=[6, 4, 3]"), "a", 100) == keys[""]
    touched = next(model.glob("*.safetensors"))
    stat = touched.stat()
    os.utime(touched, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert scores_key(draft_of(model, {"bpw": 5.0}), "a", 100) != keys[""]
    os.utime(touched, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_cache_holds_what_was_saved_and_misses_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    cache = ScoreCache("key")
    assert cache.missing({"a": (THREE, SIX), "b": ()}) == {"a": (THREE, SIX)}
    cache.scores["a", THREE] = 0.25
    cache.moments["a"] = np.array([1.0, 2.0], np.float32)
    cache.save()
    again = ScoreCache("key")
    assert again.scores == {("a", THREE): 0.25}
    np.testing.assert_array_equal(again.moments["a"], cache.moments["a"])
    assert again.missing({"a": (THREE, SIX), "b": (THREE,)}) == {"a": (SIX,), "b": (THREE,)}
    assert again.missing({"a": (THREE,)}) == {}
    assert ScoreCache("another").scores == {}
    next(tmp_path.rglob("key.json")).write_text("[{")
    assert ScoreCache("key").scores == {}
