"""A model folder proved whole: each fault that loaders or readers would meet is found, and told from one another."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from mlxq.arrays import NOT_FINITE, nan_and_infinity, rows_finite
from mlxq.budget.scoring import Remark
from mlxq.cli import app
from mlxq.errors import BadInputError, MlxqError
from mlxq.files import refuse_pointers
from mlxq.pipeline import prepare, run
from mlxq.planning.plan import Stored
from mlxq.recipe.load import recipe_from_dict
from mlxq.sources.resolve import resolve
from mlxq.sources.safetensors import open_folder
from mlxq.sources.soundness import Unsound, read_through
from mlxq.writing.contract import config_faults
from mlxq.writing.fidelity import TensorError, errors_against
from mlxq.writing.verify import Check, check_contract, check_files, check_model, check_tokenizer, verify_folder
from tests.arrays import load
from tests.checkpoints import LLAMA, VOCABULARY, build, llama, save

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 17\n"
UP = "model.layers.1.mlp.up_proj.weight"


def make(recipe: dict[str, Any], model: Path, out: Path, stored: Stored = Stored.AS_IS) -> Path:
    list(run(prepare(recipe_from_dict(recipe, "made"), resolve(str(model)), stored), out))
    return out


def with_number(folder: Path, name: str, number: float, dtype: str = "bfloat16") -> Path:
    """A Llama with ``number`` as the fifth of a parameter."""
    config = {**LLAMA, "torch_dtype": dtype}
    weights = build(config)[1]
    flat = weights[name].reshape(-1)
    weights[name] = mx.where(mx.arange(flat.size) == 5, mx.array(number, flat.dtype), flat).reshape(weights[name].shape)
    return save(folder, config, weights)


def faults_of(folder: Path, source: Path | None = None) -> list[str]:
    original = resolve(str(source)) if source else None
    checks = [event for event in verify_folder(folder, original) if isinstance(event, Check)]
    return [fault for check in checks for fault in check.faults]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("verify") / "model")


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    return make({"default": {"bits": 4}}, model, tmp_path / "out")


@pytest.mark.parametrize("dtype", sorted(NOT_FINITE))
def test_every_bit_pattern_is_told_as_what_it_is(dtype: str) -> None:
    """Against the definition of each dtype: exponent all ones, and what its specification makes of that."""
    if dtype in ("F32", "F64"):
        numbers = np.array([0, 1, -1, np.nan, -np.nan, np.inf, -np.inf], f"f{NOT_FINITE[dtype].bit_length() // 8 + 1}")
        largest = np.finfo(numbers.dtype).max
        numbers = np.concatenate([numbers, np.array([largest, -largest, 1e-40], numbers.dtype)])
        nan, infinite = np.isnan(numbers), np.isinf(numbers)
    elif dtype in ("F16", "BF16"):
        bits = np.arange(1 << 16, dtype=np.uint16)
        wide = bits.view(np.float16) if dtype == "F16" else (bits.astype(np.uint32) << 16).view(np.float32)
        numbers, nan, infinite = (bits.view(np.float16) if dtype == "F16" else bits), np.isnan(wide), np.isinf(wide)
    else:
        numbers = np.arange(256, dtype=np.uint8)
        nan = {
            "F8_E4M3": np.isin(numbers, [0x7F, 0xFF]),
            "F8_E5M2": np.isin(numbers, [0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]),
            "F8_E8M0": numbers == 0xFF,
        }[dtype]
        infinite = np.isin(numbers, [0x7C, 0xFC]) if dtype == "F8_E5M2" else np.zeros(256, bool)
    found_nan, found_infinite = nan_and_infinity(numbers, dtype)
    assert (found_nan == nan).all()
    assert (found_infinite == infinite).all()
    assert rows_finite(numbers[~(nan | infinite)], dtype)
    assert not any(rows_finite(numbers[i : i + 1], dtype) for i in np.flatnonzero(nan | infinite))
    assert rows_finite(numbers[:0], dtype)


@pytest.mark.parametrize(
    ("name", "number", "recipe", "said"),
    [
        ("model.norm.weight", np.nan, {"default": {"bits": 4}}, "model.norm.weight holds NaN in number 5"),
        ("model.norm.weight", -np.inf, {}, "model.norm.weight holds infinity in number 5"),
        (UP, np.nan, {}, f"{UP} holds NaN in row 0"),
        (UP, np.inf, {"dtype": "float16"}, f"{UP} holds infinity in row 0"),
        (UP, 1e5, {"dtype": "float16"}, r"the cast to float16 would write infinity in row 0: .* is 99840, .* at 65504"),
        (UP, 1e5, {"dtype": "float16", "default": {"bits": 4}}, "the cast to float16 would write infinity in row 0"),
        ("model.norm.weight", 1e5, {"dtype": "float16"}, "the cast to float16 would write infinity in number 5"),
        ("model.embed_tokens.weight", 1e5, {"dtype": "float16"}, "the cast to float16"),
        (
            UP,
            1e6,
            {"default": {"mode": "nvfp4"}},
            "too large for nvfp4, 4 bits, groups of 16: the scales .* end at 448",
        ),
    ],
)
def test_the_error_says_what_spoils_a_number(
    name: str, number: float, recipe: dict[str, Any], said: str, tmp_path: Path
) -> None:
    source = with_number(tmp_path / "model", name, number)
    with pytest.raises(MlxqError, match=said) as error:
        make(recipe, source, tmp_path / "out")
    assert ("source is damaged" in (error.value.hint or "")) == (not np.isfinite(number))
    assert not (tmp_path / "out").exists()


def test_a_range_beyond_float32_is_told_from_a_damaged_source(tmp_path: Path) -> None:
    source = with_number(tmp_path / "model", UP, 3e38, "float32")
    weights = load(source / "model.safetensors")
    weights[UP][0, 6] = -3e38
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "pt"})
    with pytest.raises(MlxqError, match=r"range of its numbers in row 0 .* is too large for 4 bits"):
        make({"default": {"bits": 4}}, source, tmp_path / "out")


def test_read_as_numbers_in_float16_what_is_stored_quantized(model: Path, tmp_path: Path) -> None:
    stored = make({"default": {"bits": 4}}, with_number(tmp_path / "model", UP, 1e5), tmp_path / "stored")
    with pytest.raises(MlxqError, match=f"{UP}: the cast to float16 would write infinity in row 0"):
        make({"dtype": "float16"}, stored, tmp_path / "out", Stored.DEQUANTIZE)


def test_inspect_check_lists_what_is_no_number(model: Path, tmp_path: Path) -> None:
    whole = CliRunner().invoke(app, ["inspect", str(model), "--check", "--quiet"])
    assert whole.exit_code == 0
    assert "Every number is finite" in whole.stdout
    broken = with_number(tmp_path / "broken", UP, np.nan)
    found = [event for event in read_through(resolve(str(broken))) if isinstance(event, Unsound)]
    assert found == [Unsound(UP, 1, 0, 0)]
    result = CliRunner().invoke(app, ["inspect", str(broken), "--check", "--quiet"])
    assert isinstance(result.exception, MlxqError)
    assert UP in result.exception.message
    assert UP in result.stdout
    facts = CliRunner().invoke(app, ["inspect", str(broken), "--check", "--json"])
    data = json.loads(facts.stdout)
    assert data["unsound"] == [{"tensor": UP, "nan": 1, "infinite": 0, "first_row": 0}]


def test_what_mlxq_writes_is_whole(model: Path, out: Path) -> None:
    assert faults_of(out, model) == []
    result = CliRunner().invoke(app, ["verify", str(out), "--source", str(model), "--quiet"])
    assert result.exit_code == 0, result.exception
    assert "is whole" in result.stdout.splitlines()[-1]


def test_a_folder_of_others_is_whole_and_what_cannot_be_checked_is_said(model: Path) -> None:
    checks = [event for event in verify_folder(model) if isinstance(event, Check)]
    assert not [fault for check in checks for fault in check.faults]
    assert "no mlxq.json" in checks[0].notes[0]


def edit(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / file).read_text())
        change(data)
        (folder / file).write_text(json.dumps(data))

    return apply


def both(data: dict[str, Any], **changes: Any) -> None:
    data["quantization"].update(changes)
    data["quantization_config"] = data["quantization"]


def second_weights(folder: Path) -> None:
    mx.save_safetensors(str(folder / "model-extra.safetensors"), {"other.weight": mx.zeros((2, 2))})


def reshaped(folder: Path) -> None:
    weights = load(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "another byte": (lambda f: (f / "tokenizer_config.json").write_text("{}"), "its SHA-256 differs"),
    "a file gone": (lambda f: (f / "generation_config.json").unlink(), "generation_config.json is missing"),
    "other weights": (second_weights, "model-extra.safetensors holds weights that mlxq did not write"),
    "weights not in the index": (second_weights, "model-extra.safetensors is not in model.safetensors.index.json"),
    "a pointer": (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git LFS pointer"),
    "half the config": (edit("config.json", lambda c: c.pop("quantization_config")), "not the same as quantization"),
    "a null": (edit("config.json", lambda c: both(c, group_size=None)), "group_size None"),
    "a mode of its own": (edit("config.json", lambda c: both(c, mode="mine")), "unknown mode 'mine'"),
    "a layer in part": (
        edit("config.json", lambda c: both(c, lm_head={"bits": 4})),
        "lm_head has bits 4 and group_size",
    ),
    "a key too many": (edit("config.json", lambda c: both(c, linear_class="x")), "neither a format in full nor false"),
    "a module it lacks": (edit("config.json", lambda c: both(c, nobody=False)), "names nobody, which the model lacks"),
    "other bits": (edit("config.json", lambda c: both(c, bits=8)), "the file holds 4 bits"),
    "another size": (
        edit("model.safetensors.index.json", lambda i: i["metadata"].update(total_size=1)),
        "has total_size 1",
    ),
    "a tensor not listed": (
        edit("model.safetensors.index.json", lambda i: i["weight_map"].pop("model.norm.weight")),
        "model.norm.weight is in model.safetensors, and .* does not name it",
    ),
    "a tensor that is not there": (
        edit("model.safetensors.index.json", lambda i: i["weight_map"].update({"x.weight": "model.safetensors"})),
        "x.weight is in no file",
    ),
    "a cut file": (lambda f: os.truncate(f / "model.safetensors", 9999), "cut short"),
    "another shape": (reshaped, "it does not load"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, out: Path) -> None:
    change, said = BROKEN[name]
    change(out)
    report = json.loads((out / "mlxq.json").read_text())
    checks = [check_files(out, report), check_contract(out), check_model(out)[0]]
    assert any(re.search(said, fault) for check in checks for fault in check.faults), checks


def test_formats_say_their_mode_where_the_models_own_is_another() -> None:
    entry = {"group_size": 64, "bits": 4}
    stated: dict[str, Any] = {
        "group_size": 32,
        "bits": 4,
        "mode": "mxfp4",
        "a": {**entry, "mode": "affine"},
        "b": False,
    }
    assert list(config_faults({"quantization": stated, "quantization_config": stated})) == []
    stated["a"] = entry
    assert list(config_faults({"quantization": stated, "quantization_config": stated})) == [
        "config.json: a has no mode"
    ]


def test_numbers_and_scales_are_read_through(model: Path, tmp_path: Path) -> None:
    out = make({"default": {"mode": "mxfp4"}}, model, tmp_path / "out")
    weights = load(out / "model.safetensors")
    weights["model.norm.weight"][3] = mx.nan
    weights[UP.replace("weight", "scales")][2, 0] = 255
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    faults = faults_of(out)
    assert any(fault.startswith("model.norm.weight holds 1 NaN") for fault in faults)
    assert any(
        fault.startswith(f"{UP.replace('weight', 'scales')} holds 1 NaN, the first in row 2") for fault in faults
    )


@pytest.mark.parametrize(
    "recipe",
    [
        {"default": {"bits": 2}},
        {"default": {"bits": 4, "group_size": 32}, "dtype": "float16"},
        {"default": {"mode": "mxfp4"}},
        {"default": {"mode": "nvfp4"}},
        {"default": {"mode": "mxfp8"}},
        {"default": {"bits": 3}, "method": "fit", "calibration": {"text": "none"}},
        {"dtype": "float16"},
        {},
    ],
    ids=str,
)
def test_errors_are_those_of_the_format_and_no_others(recipe: dict[str, Any], model: Path, tmp_path: Path) -> None:
    out = make(recipe, model, tmp_path / "out")
    report = json.loads((out / "mlxq.json").read_text())
    methods = {module["path"]: module["method"] for module in report["modules"]}

    def wrong() -> list[str]:
        events = errors_against(open_folder(out, "out"), resolve(str(model)), methods)
        return [event.path for event in events if isinstance(event, TensorError) and not event.within]

    assert wrong() == []
    # Rows of another place in the tensor, whose numbers are as likely as its own.
    weights = load(out / "model.safetensors")
    for part in ("weight", "scales", "biases"):
        if (name := UP.replace("weight", part)) in weights:
            weights[name] = mx.roll(weights[name], 1, 0)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.02
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    assert sorted(wrong()) == [UP, "model.norm.weight"]


def test_what_is_read_from_quantized_storage_is_held_against_it(out: Path, tmp_path: Path) -> None:
    assert faults_of(make({}, out, tmp_path / "numbers", Stored.DEQUANTIZE), out) == []
    assert faults_of(make({}, out, tmp_path / "same"), out) == []


def grown_tokenizer(folder: Path, *, special: bool) -> None:
    """A token more than the embedding has rows."""
    data = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": VOCABULARY, "content": "<image>", "special": special, "normalized": False}
    data["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_a_token_that_text_can_come_to_must_have_a_row(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    grown_tokenizer(source, special=False)
    said = f"token '<image>' has id {VOCABULARY}, and the model's embedding has {VOCABULARY} rows"
    with pytest.raises(BadInputError, match=said):
        make({"default": {"bits": 4}}, source, tmp_path / "out")
    result = CliRunner().invoke(app, ["quantize", str(source), "--bpw", "4.5", "-o", str(tmp_path / "out"), "-q"])
    assert isinstance(result.exception, BadInputError)
    assert said in result.exception.message
    assert check_tokenizer(source, VOCABULARY).faults == (said,)


def test_a_special_token_without_a_row_is_said_and_no_more(tmp_path: Path) -> None:
    source = llama(tmp_path / "model")
    grown_tokenizer(source, special=True)
    plan = prepare(recipe_from_dict({"default": {"bits": 4}}, "made"), resolve(str(source)))
    remarks = [event.text for event in run(plan, tmp_path / "out") if isinstance(event, Remark)]
    assert "'<image>'" in remarks[0]
    assert remarks[0] in json.loads((tmp_path / "out" / "mlxq.json").read_text())["notes"]
    found = check_tokenizer(tmp_path / "out", VOCABULARY)
    assert found.faults == ()
    assert "'<image>'" in found.notes[0]


def test_calibration_text_is_not_fed_past_the_embedding(tmp_path: Path) -> None:
    """A tokenizer without tokenizer.json is known only by what it makes of text."""
    from mlxq.architecture.token_ids import check_ids, rows_of_model
    from mlxq.calibration.text import Windows, sample_from

    found, _ = build(LLAMA)
    assert rows_of_model(found) == VOCABULARY
    check_ids(np.array([[0, VOCABULARY - 1]]), VOCABULARY, "its tokenizer")
    for wrong in (VOCABULARY, -1):
        with pytest.raises(BadInputError, match=f"gives token id {wrong}, and the model's embedding has 96 rows"):
            check_ids(np.array([[0, wrong]]), VOCABULARY, "its tokenizer")
    with pytest.raises(BadInputError, match="its start token gives token id 96"):
        sample_from(found, Windows(2), (VOCABULARY,), tokens=4)


def test_git_lfs_pointers_are_named_wherever_they_are_met(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE"):
        source = llama(tmp_path / name.partition(".")[0] / "model")
        (source / name).write_text(POINTER)
        with pytest.raises(BadInputError, match="is a Git LFS pointer") as error:
            make({"default": {"bits": 4}}, source, tmp_path / "out")
        assert "git lfs pull" in (error.value.hint or "")
        assert not (tmp_path / "out").exists()
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(BadInputError, match="is a Git LFS pointer"):
        resolve(str(tmp_path / "model.gguf"))
    refuse_pointers({"notes": b"version https of something else"})


def test_a_rebuilt_model_is_said_to_be_the_same(model: Path, out: Path, tmp_path: Path) -> None:
    locked = ["quantize", "--locked", str(out / "mlxq.json"), "--model", str(model), "--no-generate"]
    result = CliRunner().invoke(app, [*locked, "-o", str(tmp_path / "again")])
    assert result.exit_code == 0, result.exception
    report = json.loads((out / "mlxq.json").read_text())
    compared = len(report["files"]) - ("README.md" in report["files"])
    assert f"rebuilt: {compared} files, byte for byte as recorded" in " ".join(result.stderr.split())
