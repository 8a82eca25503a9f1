"""Checkpoints that other tools quantized: read where mlx_lm reads them, refused clearly where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from mlxq.errors import BadInputError
from mlxq.pipeline import Options, prepare
from mlxq.recipe import load_recipe, recipe_from_dict
from mlxq.tables import plan_notes
from tests.checkpoints import LLAMA, build, save
from tests.test_bit_identity import SMALL, quantize, tensors

CAST = recipe_from_dict({}, "mlx")


def rewritten(folder: Path, quantization: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    """A checkpoint that says it is quantized by another tool."""
    return save(folder, {**LLAMA, "torch_dtype": "float16", "quantization_config": quantization}, weights)


def awq(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A 4-bit AutoAWQ checkpoint with random codes, and the values its linear layers stand for."""
    _, weights = build({**LLAMA, "torch_dtype": "float16"})
    order, generator = [0, 2, 4, 6, 1, 3, 5, 7], np.random.default_rng(0)
    stored: dict[str, mx.array] = {}
    values: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        if "proj" not in name:
            stored[name] = array
            continue
        rows, columns = array.shape
        codes = generator.integers(0, 16, (columns, rows))
        zeros = generator.integers(0, 16, (columns // 64, rows))
        scales = (generator.random((columns // 64, rows)) * 0.01 + 0.005).astype(np.float16)

        def pack(numbers: np.ndarray) -> mx.array:
            eights = numbers.reshape(numbers.shape[0], -1, 8)[..., order].astype(np.uint32)
            return mx.array((eights << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32).view(np.int32))

        stored[f"{module}.qweight"], stored[f"{module}.qzeros"] = pack(codes), pack(zeros)
        stored[f"{module}.scales"] = mx.array(scales)
        spread = np.repeat(np.arange(columns // 64), 64)
        values[module] = ((codes - zeros[spread]) * scales[spread].astype(np.float32)).T
    return rewritten(folder, {"quant_method": "awq", "bits": 4, "group_size": 64}, stored), values


def test_awq_is_carried_over_as_mlx_lm_reads_it(tmp_path: Path) -> None:
    model, _ = awq(tmp_path / "model")
    quantize(model, tmp_path / "ours", CAST)
    loaded, _ = mlx_lm.load(str(tmp_path / "ours"))
    theirs, _ = mlx_lm.load(str(model))
    ids = mx.array([[3, 4, 5]])
    assert mx.array_equal(loaded(ids), theirs(ids)).item()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"]["group_size"] == 64


def test_what_stays_in_a_foreign_format_is_said(tmp_path: Path) -> None:
    model, _ = awq(tmp_path / "model")
    plan = prepare(load_recipe("8bit"), str(model), Options())
    assert any("14 modules stay as the source has them quantized (14 in 4:64)" in line for line in plan_notes(plan))
    opened = prepare(load_recipe("8bit"), str(model), Options(requantize=True))
    assert not plan_notes(opened)
    assert {str(d.format) for d in opened.decisions} == {"8:64"}


def test_requantizing_starts_from_the_values(tmp_path: Path) -> None:
    model, values = awq(tmp_path / "model")
    quantize(model, tmp_path / "plain", CAST, Options(dequantize=True))
    written = tensors(tmp_path / "plain")
    for module, expected in values.items():
        found = np.asarray(written[f"{module}.weight"].astype(mx.float32))
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_quantized_mlx_model_is_refused_with_a_way_on(tmp_path: Path) -> None:
    model = save(tmp_path / "model", SMALL, build(SMALL)[1])
    quantize(model, tmp_path / "first", load_recipe("8bit"))
    with pytest.raises(BadInputError, match="already quantized for MLX") as caught:
        prepare(load_recipe("4bit"), str(tmp_path / "first"), Options())
    assert "--requantize" in str(caught.value.hint)
    plan = prepare(load_recipe("4bit"), str(tmp_path / "first"), Options(requantize=True))
    assert {str(d.format) for d in plan.decisions} == {"4:64"}


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "gptq", "bits": 3, "group_size": 64},
    ],
)
def test_what_mlx_lm_cannot_read_is_refused(tmp_path: Path, quantization: dict[str, Any]) -> None:
    model = rewritten(tmp_path / "model", quantization, build({**LLAMA, "torch_dtype": "float16"})[1])
    with pytest.raises(BadInputError, match=quantization["quant_method"]) as caught:
        prepare(load_recipe("4bit"), str(model), Options())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "up_proj"),
        (lambda w: w.update({"model.layers.1.mlp.surprise.weight": mx.zeros((2, 2))}), "surprise"),
        (lambda w: w.update({"lm_head.weight": mx.zeros((3, 128))}), "lm_head"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path: Path, change: Any, said: str) -> None:
    _, weights = build(LLAMA)
    change(weights)
    model = save(tmp_path / "model", LLAMA, weights)
    with pytest.raises(BadInputError) as caught:
        prepare(load_recipe("4bit"), str(model), Options())
    assert said in caught.value.message


def test_an_unknown_architecture_and_foreign_code_are_refused(tmp_path: Path) -> None:
    _, weights = build(LLAMA)
    model = save(tmp_path / "unknown", {**LLAMA, "model_type": "never_seen"}, weights)
    with pytest.raises(BadInputError, match="never_seen"):
        prepare(CAST, str(model), Options())
    model = save(tmp_path / "code", {**LLAMA, "model_file": "model.py"}, weights)
    (model / "model.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BadInputError, match=r"model\.py") as caught:
        prepare(CAST, str(model), Options())
    assert "--trust-remote-code" in str(caught.value.hint)
