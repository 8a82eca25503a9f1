"""Memory arithmetic, held against the caches that ``mlx_lm`` really makes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from mlxq.architecture.config import active_share
from mlxq.architecture.kv_cache import activation_bytes, kv_cache_bytes
from mlxq.machine.devices import Device
from mlxq.machine.memory import BASE_OVERHEAD_BYTES, Footprint, fit, weight_room

DENSE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}

DEEPSEEK = {
    **DENSE,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": None,
    "first_k_dense_replace": 4,
    "rope_scaling": None,
}
del DEEPSEEK["head_dim"]

QWEN3_NEXT = {
    **DENSE,
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 0,
    "mlp_only_layers": [],
    "moe_intermediate_size": 0,
    "partial_rotary_factor": 0.25,
}

MAMBA2 = {
    "num_heads": 8,
    "head_dim": 16,
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "state_size": 16,
    "num_hidden_layers": 4,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "tie_word_embeddings": True,
    "time_step_limit": [0.0, 1e9],
    "time_step_rank": 4,
    "ssm_state_size": 16,
    "max_position_embeddings": 256,
}

GEMMA4 = {
    **DENSE,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
}

EXPERTS = {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2}

LLAMA4 = {
    **EXPERTS,
    "attention_chunk_size": 256,
    "intermediate_size_mlp": 96,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": False,
    "no_rope_layers": [1, 1, 1, 0],
    "attention_bias": False,
    "rope_scaling": None,
}

LONGCAT = {
    **DEEPSEEK,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "num_layers": 4,
    "n_routed_experts": 4,
    "zero_expert_num": 0,
    "zero_expert_type": "identity",
    "moe_topk": 2,
    "attention_method": "MLA",
    "routed_scaling_factor": 1.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_bias": False,
    "q_lora_rank": 32,
}

FALCON_H1 = {
    **DENSE,
    "mamba_d_conv": 4,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "attention_bias": False,
}

JAMBA = {
    **DENSE,
    "attn_layer_period": 4,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "mamba_expand": 2,
    "num_experts": 1,
    "num_experts_per_tok": 1,
}

MAMBA = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "state_size": 16,
    "conv_kernel": 4,
    "vocab_size": 128,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
}

RECURRENT_GEMMA = {
    **DENSE,
    "num_hidden_layers": 6,
    "num_key_value_heads": 1,
    "attention_window_size": 256,
    "attention_bias": False,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "embeddings_scale_by_sqrt_dim": True,
    "block_types": ["recurrent", "recurrent", "attention"],
}

LFM2 = {
    **DENSE,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "conv_L_cache": 3,
    "conv_bias": False,
    "full_attn_idxs": [1, 3],
    "norm_eps": 1e-5,
}

# Exact where every layer attends; where layers keep a state, an upper bound (fp32 throughout).
EXACT = [
    ("llama", DENSE),
    ("llama", {**DENSE, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 256}),
    ("qwen3", {**DENSE, "sliding_window": 256, "use_sliding_window": False}),
    ("gemma3_text", {**DENSE, "num_hidden_layers": 7, "sliding_window": 256, "sliding_window_pattern": 6}),
    ("gemma2", {**DENSE, "sliding_window": 256, "query_pre_attn_scalar": 16}),
    ("cohere2", {**DENSE, "num_hidden_layers": 5, "sliding_window": 256, "logit_scale": 1.0, "attention_bias": False}),
    ("olmo3", {**DENSE, "num_hidden_layers": 5, "sliding_window": 256}),
    ("exaone4", {**DENSE, "sliding_window": 256, "sliding_window_pattern": "LLG", "rope_scaling": None}),
    ("gpt_oss", {**EXPERTS, "sliding_window": 256, "rope_scaling": None}),
    ("gemma4_text", GEMMA4),
    # Alone it keeps every token; as the language model of llama4, chunks.
    ("llama4_text", {**LLAMA4, "attn_temperature_tuning": None, "floor_scale": None, "attn_scale": None}),
    ("llama4", {"text_config": {**LLAMA4, "model_type": "llama4_text"}}),
    ("longcat_flash", LONGCAT),
    ("deepseek_v3", DEEPSEEK),
    ("deepseek_v2", {**DEEPSEEK, "rope_scaling": {"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}}),
]
STATEFUL = [
    ("qwen3_next", QWEN3_NEXT),
    ("mamba2", MAMBA2),
    ("falcon_h1", FALCON_H1),
    ("jamba", JAMBA),
    ("mamba", MAMBA),
    ("recurrent_gemma", RECURRENT_GEMMA),
    ("lfm2", LFM2),
]


def real_cache_bytes(model_type: str, config: dict[str, Any], tokens: int, dtype: str = "bfloat16") -> int:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.cache import make_prompt_cache

    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": model_type, **config}))
    model.update(tree_map(lambda weight: weight.astype(getattr(mx, dtype)), model.parameters()))
    cache = make_prompt_cache(model)
    model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache)
    # As in generation: the next token is what trims a rotating cache to its window.
    model(mx.zeros((1, 1), dtype=mx.int32), cache=cache)
    mx.eval([c.state for c in cache])
    return sum(c.nbytes for c in cache)


@pytest.mark.parametrize(("model_type", "config"), EXACT)
def test_attention_caches_are_what_mlx_lm_makes(model_type: str, config: dict[str, Any]) -> None:
    stated = {"model_type": model_type, **config}
    # In fp32, as the CPU multiplies by experts in nothing else; twice the bytes.
    assert kv_cache_bytes(stated, 500) == real_cache_bytes(model_type, config, 499, "float32") // 2


@pytest.mark.parametrize("model_type", ["llama4", "cohere2"])
def test_a_window_bounds_the_cache_of_a_long_text(model_type: str) -> None:
    config = dict(EXACT)[model_type]
    stated = {"model_type": model_type, **config}
    assert kv_cache_bytes(stated, 2000) == real_cache_bytes(model_type, config, 1999, "float32") // 2


@pytest.mark.parametrize(("model_type", "config"), STATEFUL)
def test_states_are_bounded_closely(model_type: str, config: dict[str, Any]) -> None:
    stated = {"model_type": model_type, **config}
    real = real_cache_bytes(model_type, config, 499)
    assert real <= kv_cache_bytes(stated, 500) <= 2 * real


def test_a_nested_text_model_is_the_one_that_counts() -> None:
    nested = {"model_type": "some_vlm", "hidden_size": 1, "text_config": {"model_type": "llama", **DENSE}}
    assert kv_cache_bytes(nested, 1000) == kv_cache_bytes({"model_type": "llama", **DENSE}, 1000) > 0


def test_state_space_models_do_not_grow() -> None:
    stated = {"model_type": "mamba2", **MAMBA2}
    assert kv_cache_bytes(stated, 100) == kv_cache_bytes(stated, 100_000)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"num_experts_per_tok": 8, "num_experts": 128}, 8 / 128),
        ({"num_experts_per_tok": 2, "num_local_experts": 8}, 2 / 8),
        ({"num_experts_per_tok": 6, "n_routed_experts": 64}, 6 / 64),
        ({"ffn_config": {"moe_top_k": 4, "moe_num_experts": 16}}, 4 / 16),
        ({"text_config": {"moe_topk": [1, 1], "num_experts": 16}}, 1 / 16),
        ({"num_experts": 0, "num_experts_per_tok": 0}, 1.0),
        ({}, 1.0),
    ],
)
def test_active_share_of_experts(config: dict[str, Any], share: float) -> None:
    assert active_share(config) == share


def footprint(weight_bytes: int, read_bytes: int, context: int) -> Footprint:
    config = {"model_type": "llama", **DENSE}
    return Footprint(weight_bytes, read_bytes, kv_cache_bytes(config, context), activation_bytes(config, context))


def test_fit_adds_up_and_the_ceiling_is_bandwidth_over_bytes_read() -> None:
    device = Device("test", "test", 8 << 30, 0.75, 100e9)
    takes = footprint(2_000_000_000, 500_000_000, 4096)
    found = fit(takes, device)
    assert takes.kv_cache_bytes == found.kv_cache_bytes == 4 * 4096 * 2 * 32 * 2
    # One chunk of 2048 tokens: 8 widths of 64 and 3 of 96 in 16 bits, and 128 logits in fp32, twice.
    assert takes.activation_bytes == 2048 * (8 * 64 + 3 * 96) * 2 + 128 * 4 * 2
    assert found.overhead_bytes == BASE_OVERHEAD_BYTES + takes.activation_bytes
    assert found.needed_bytes == 2_000_000_000 + found.kv_cache_bytes + found.overhead_bytes
    assert found.weight_bytes == 2_000_000_000
    assert found.usable_bytes == 6 << 30
    assert found.fits
    assert found.decode_tps_ceiling == pytest.approx(100e9 / (500_000_000 + found.kv_cache_bytes))


def test_a_model_fits_up_to_the_last_byte_of_the_room_for_weights() -> None:
    device = Device("test", "test", 8 << 30, 0.75, 100e9)
    beside = footprint(0, 0, 4096)
    room = weight_room(device, kv_cache_bytes=beside.kv_cache_bytes, activation_bytes=beside.activation_bytes)
    assert fit(footprint(room, room, 4096), device).fits
    assert not fit(footprint(room + 1, room + 1, 4096), device).fits


def test_prompts_are_read_in_chunks() -> None:
    config = {"model_type": "llama", **DENSE}
    assert activation_bytes(config, 100) < activation_bytes(config, 2048) == activation_bytes(config, 100_000)


def test_the_experts_of_a_token_work_side_by_side() -> None:
    config = {**DENSE, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
    assert activation_bytes(config, 1) == (8 * 64 + 3 * 4 * 64) * 2 + 1024


def test_no_bandwidth_no_ceiling() -> None:
    device = Device("test", "test", 8 << 30, 1.0, None)
    assert fit(footprint(1, 1, 16), device).decode_tps_ceiling is None
