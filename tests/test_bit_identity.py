"""Plain settings give the same bits as ``mlx_lm.convert``, over many architectures, and load in ``mlx_lm``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxq.metrics.size import measure_size
from mlxq.pipeline import Finished, prepare, run
from mlxq.planning.plan import Stored
from mlxq.recipe.load import load_recipe, recipe_from_dict
from mlxq.sources.resolve import resolve
from tests.checkpoints import LLAMA, VOCABULARY, build, save

SMALL: dict[str, Any] = {**LLAMA, "head_dim": 32, "max_position_embeddings": 512, "rope_theta": 1e4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MAMBA = {
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "state_size": 16,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "llama_tied": {**SMALL, "tie_word_embeddings": True},
    "qwen2": {**SMALL, "model_type": "qwen2"},
    "qwen3_qk_norm": {**SMALL, "model_type": "qwen3"},
    "qwen3_moe": {
        **SMALL, **MOE, "model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "mixtral": {
        **SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
    },
    "gemma2_softcap": {**SMALL, "model_type": "gemma2"},
    "gemma3_sliding": {**SMALL, "model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2},
    "deepseek_v2_mla": {
        **SMALL, **MOE, "model_type": "deepseek_v2", "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 64,
        "q_lora_rank": 64, "qk_rope_head_dim": 32, "v_head_dim": 32, "qk_nope_head_dim": 32, "num_key_value_heads": 4,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "mscale_all_dim": 0.7},
    },
    "mamba": {**MAMBA, "model_type": "mamba"},
    "mamba2": {
        **MAMBA, "model_type": "mamba2", "num_heads": 8, "head_dim": 32, "n_groups": 1, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False, "time_step_limit": [0.0, 1.0],
    },
    "gemma3_vision": {
        "model_type": "gemma3", "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
        "text_config": {
            **SMALL, "model_type": "gemma3_text", "sliding_window": 16, "sliding_window_pattern": 2,
            "intermediate_size": 128,
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32},
    },
    "qwen2_vl_vision": {
        **SMALL, "model_type": "qwen2_vl", "vision_config": {"hidden_size": 32},
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    },
    "mistral3_vision": {
        "model_type": "mistral3", "torch_dtype": "bfloat16", "vision_config": {"model_type": "pixtral"},
        "text_config": {**SMALL, "model_type": "mistral"},
    },
    "olmo2": {**SMALL, "model_type": "olmo2"},
    "phi3_fused_qkv": {**SMALL, "model_type": "phi3"},
    "starcoder2_biases": {**SMALL, "model_type": "starcoder2", "norm_epsilon": 1e-5},
    "cohere2": {**SMALL, "model_type": "cohere2", "sliding_window": 16, "sliding_window_pattern": 2},
    "spark2_5_asks_to_leave_alone": {
        **SMALL, "model_type": "spark2_5", "sliding_window": 16, "tie_word_embeddings": True,
        "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e4}},
    },
    "granitemoe_asks_for_8_bits": {
        **SMALL, "model_type": "granitemoe", "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 1.0,
        "attention_multiplier": 1.0, "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_bias": False,
        "intermediate_size": 64,
    },
}  # fmt: skip
# Towers that mlx_lm leaves behind.
VISION: dict[str, dict[str, mx.array]] = {
    "gemma3_vision": {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": mx.ones((32, 32)),
        "multi_modal_projector.mm_input_projection_weight": mx.ones((32, 128)),
    },
    "qwen2_vl_vision": {"visual.blocks.0.attn.qkv.weight": mx.ones((96, 32)), "visual.merger.mlp.0.bias": mx.ones(32)},
    "mistral3_vision": {
        "vision_tower.patch_conv.weight": mx.ones((32, 3, 2, 2)),
        "multi_modal_projector.linear_1.weight": mx.ones((128, 32)),
    },
}
DENSE = ["llama", "llama_tied", "qwen2", "qwen3_qk_norm", "gemma2_softcap", "olmo2", "phi3_fused_qkv"]


def as_checkpoint(name: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Undo what ``sanitize`` does where a Hugging Face checkpoint of that kind looks different."""
    found = {}
    for path, array in weights.items():
        if name == "mixtral" and ".switch_mlp." in path:
            prefix, _, rest = path.partition(".switch_mlp.")
            number = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[rest.removesuffix(".weight")]
            for expert in range(array.shape[0]):
                found[f"{prefix}.experts.{expert}.{number}.weight"] = mx.contiguous(array[expert])
        elif name in ("qwen3_moe", "deepseek_v2_mla") and ".switch_mlp." in path:
            prefix, _, rest = path.partition(".switch_mlp.")
            for expert in range(array.shape[0]):
                found[f"{prefix}.experts.{expert}.{rest}"] = mx.contiguous(array[expert])
        elif name.startswith("mamba") and path.endswith("conv1d.weight"):
            found[path] = mx.contiguous(array.moveaxis(2, 1))
        elif name == "qwen2_vl_vision":
            found[path.removeprefix("language_model.")] = array
        else:
            found[path] = array
    return {**found, **VISION.get(name, {})}


def checkpoint(folder: Path, name: str, shards: int = 1) -> Path:
    """A Hugging Face style checkpoint of one of ``CONFIGS``."""
    _, weights = build(CONFIGS[name])
    return save(folder, CONFIGS[name], as_checkpoint(name, weights), shards)


def quantize(model: Path, out: Path, recipe: Any, stored: Stored = Stored.AS_IS) -> Finished:
    """Run the whole line and return its last event."""
    plan = prepare(recipe, resolve(str(model)), stored)
    *_, last = run(plan, out)
    assert isinstance(last, Finished)
    assert plan.file_bytes == sum(f.stat().st_size for f in out.glob("model*.safetensors"))
    return last


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder."""
    return {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in mx.load(str(file)).items()}


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """Same names, shapes, dtypes and bytes."""
    one, other = tensors(ours), tensors(theirs)
    assert sorted(one) == sorted(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.shape == other[name].shape, name
        assert bytes(np.asarray(array.view(mx.uint8))) == bytes(np.asarray(other[name].view(mx.uint8))), name


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
