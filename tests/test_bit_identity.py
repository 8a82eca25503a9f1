"""Plain settings give the same bits as ``mlx_lm.convert``, over many architectures, and load in ``mlx_lm``."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from mlxq.metrics.size import measure_size
from mlxq.planning.plan import Stored
from mlxq.recipe.load import load_recipe, recipe_from_dict
from tests.architectures import CONFIGS, SMALL, VISION, checkpoint
from tests.arrays import assert_same_bits, tensors
from tests.checkpoints import build, save
from tests.runs import quantize

DENSE = ["llama", "llama_tied", "qwen2", "qwen3_qk_norm", "gemma2_softcap", "olmo2", "phi3_fused_qkv"]


@pytest.mark.parametrize("name", CONFIGS)
def test_uniform_4_bit_equals_mlx_lm(name: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", name, shards=2)
    quantize(model, tmp_path / "ours", load_recipe("4bit"))
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_each_mode_equals_mlx_lm(name: str, mode: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", name)
    quantize(model, tmp_path / "ours", load_recipe(mode))
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_mode=mode)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_each_width_equals_mlx_lm(bits: int, group_size: int, tmp_path: Path) -> None:
    config = {**SMALL, "intermediate_size": 256}
    model = save(tmp_path / "model", config, build(config)[1])
    recipe = recipe_from_dict({"default": {"bits": bits, "group_size": group_size}}, "test")
    quantize(model, tmp_path / "ours", recipe)
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=group_size)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("preset", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
@pytest.mark.parametrize("name", DENSE)
def test_mixed_presets_equal_mlx_lm(name: str, preset: str, tmp_path: Path) -> None:
    config = {**CONFIGS[name], "num_hidden_layers": 9}
    model = save(tmp_path / "model", config, build(config)[1])
    quantize(model, tmp_path / "ours", load_recipe(preset))
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_group_size=64, quant_predicate=preset)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("name", CONFIGS)
def test_convert_keeps_every_value(name: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", name)
    quantize(model, tmp_path / "ours", recipe_from_dict({}, "mlx"))
    mlx_lm.convert(str(model), str(tmp_path / "theirs"))
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_dequantize_gives_the_values_the_kernels_use(name: str, mode: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", name)
    quantize(model, tmp_path / "packed", recipe_from_dict({"default": {"mode": mode}}, "test"))
    quantize(tmp_path / "packed", tmp_path / "plain", recipe_from_dict({}, "mlx"), Stored.DEQUANTIZE)
    packed, plain = tensors(tmp_path / "packed"), tensors(tmp_path / "plain")
    recorded = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    for path, array in plain.items():
        module = path.removesuffix(".weight")
        if f"{module}.scales" not in packed:
            continue
        form = recorded.get(module, {k: recorded[k] for k in ("group_size", "bits", "mode")})
        values = mx.dequantize(
            packed[path],
            scales=packed[f"{module}.scales"],
            biases=packed.get(f"{module}.biases"),
            dtype=mx.bfloat16,
            **form,
        )
        assert mx.array_equal(array, values).item(), path


def test_every_parameter_written_is_one_the_model_has(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "deepseek_v2_mla")
    quantize(model, tmp_path / "ours", load_recipe("4bit"))
    loaded, _ = mlx_lm.load(str(tmp_path / "ours"))
    assert sorted(dict(tree_flatten(loaded.parameters()))) == sorted(tensors(tmp_path / "ours"))


def test_bits_per_weight_are_those_of_the_files(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "qwen3_moe")
    finished = quantize(model, tmp_path / "ours", load_recipe("4bit"))
    size = measure_size(tmp_path / "ours")
    stored = tensors(tmp_path / "ours")
    assert size.weight_bytes == sum(a.nbytes for a in stored.values())
    assert size.parameter_count == sum(a.size for a in build(CONFIGS["qwen3_moe"])[1].values())
    assert finished.report["metrics"]["bits_per_weight"] == size.weight_bytes * 8 / size.parameter_count
    assert size.module_bits["model.layers.0.mlp.gate"] == 8, "the model asks for 8 bits there"


@pytest.mark.parametrize("name", VISION)
def test_vision_towers_are_left_behind_with_their_config(name: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", name)
    quantize(model, tmp_path / "ours", load_recipe("4bit"))
    assert not any("vision" in tensor or "visual" in tensor for tensor in tensors(tmp_path / "ours"))
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64)
    ours, theirs = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs"))
    for config in (ours, theirs):
        for key in ("quantization", "quantization_config"):
            del config[key]
    assert ours == theirs


VLM = ["llama", "llama_tied", "qwen3_moe", "mixtral", "deepseek_v2_mla", "mamba2", "qwen2_vl_vision", "cohere2"]


@pytest.mark.parametrize("name", VLM)
def test_mlx_vlm_computes_the_same_with_what_we_write(name: str, tmp_path: Path) -> None:
    vlm = pytest.importorskip("mlx_vlm.utils")
    rules = [
        {"match": ["down_proj", "o_proj", "out_proj"], "bits": 6, "optional": True},
        {"match": "v_proj", "keep": True, "optional": True},
    ]
    model = checkpoint(tmp_path / "model", name)
    quantize(model, tmp_path / "ours", recipe_from_dict({"default": {"bits": 4}, "rules": rules}, "test"))
    ids = mx.array([[3, 4, 5]])
    found = vlm.load_model(tmp_path / "ours")(ids)
    expected = mlx_lm.load(str(tmp_path / "ours"))[0](ids)
    assert mx.array_equal(getattr(found, "logits", found), expected).item()
