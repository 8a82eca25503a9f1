"""Small checkpoints of many families of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

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


DEEPSEEK: dict[str, Any] = {
    **CONFIGS["deepseek_v2_mla"], "model_type": "deepseek_v3", "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "rope_scaling": None, "qk_nope_head_dim": 64,
}  # fmt: skip


def deepseek_weights() -> dict[str, mx.array]:
    """DeepSeek V3 as published: an expert a tensor, and one projection for keys and values."""
    found: dict[str, mx.array] = {}
    for path, array in build(DEEPSEEK)[1].items():
        prefix, _, rest = path.partition(".switch_mlp.")
        if rest:
            found.update({f"{prefix}.experts.{i}.{rest}": mx.contiguous(array[i]) for i in range(array.shape[0])})
        elif not path.endswith(("embed_q.weight", "unembed_out.weight")):
            found[path] = array
    for layer in range(DEEPSEEK["num_hidden_layers"]):
        joined = (mx.random.normal((4 * (64 + 32), 64)) * 0.1).astype(mx.bfloat16)
        found[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = joined
    return found


HUNYUAN: dict[str, Any] = {
    **SMALL, "model_type": "hunyuan", "attention_bias": False, "moe_topk": 1, "num_experts": 1, "num_shared_expert": 1,
    "use_mixed_mlp_moe": False, "use_qk_norm": True, "use_cla": True, "cla_share_factor": 2,
    "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
}  # fmt: skip
