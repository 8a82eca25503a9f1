"""What a model keeps of its tokens, by each way that configs say it, in numbers worked out by hand.

``tests/test_fit.py`` holds the same against the caches that ``mlx_lm`` makes.
"""

from __future__ import annotations

from typing import Any

import pytest

from mlxq.architecture.kv_cache import CACHE_STEP, PREFILL_STEP, activation_bytes, kv_cache_bytes

# One attention layer: 4 heads of width 8, 2 of them for keys and values, so 2 * (8 + 8) numbers a token in 16 bits.
PLAIN: dict[str, Any] = {
    "model_type": "of no family",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKEN = 2 * (8 + 8) * 2
STEP = CACHE_STEP


def cache(context: int = STEP, **keys: Any) -> int:
    return kv_cache_bytes({**PLAIN, **keys}, context)


def per_token(**keys: Any) -> float:
    """Numbers that one token adds, in 16 bits, far from any rounding."""
    return (cache(1000 * STEP, **keys) - cache(999 * STEP, **keys)) / STEP / 2


@pytest.mark.parametrize(("context", "steps"), [(1, 1), (255, 1), (256, 1), (257, 2), (512, 2), (513, 3)])
def test_caches_grow_in_steps(context: int, steps: int) -> None:
    assert cache(context) == steps * STEP * TOKEN


def test_every_layer_has_its_own() -> None:
    assert cache(num_hidden_layers=3) == 3 * STEP * TOKEN


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ({}, 32),
        ({"head_dim": 16}, 64),
        ({"attention_head_dim": 16}, 64),
        ({"head_dim": 16, "v_head_dim": 4}, 40),
        ({"num_key_value_heads": None}, 64),
        ({"num_key_value_heads": [1]}, 16),
        ({"num_key_value_heads": None, "n_head_kv": 1}, 16),
        ({"num_key_value_heads": None, "n_kv_heads": 1}, 16),
        ({"num_key_value_heads": None, "num_kv_heads": 1}, 16),
        ({"multi_query": True}, 16),
        ({"hidden_size": None, "n_embd": 64}, 64),
        ({"hidden_size": None, "model_dim": 64}, 64),
        ({"hidden_size": None, "d_model": 64}, 64),
        ({"num_attention_heads": None, "n_head": 2}, 64),
        ({"num_attention_heads": None, "n_heads": 2}, 64),
        ({"num_attention_heads": None, "num_heads": 2}, 64),
        ({"num_attention_heads": None, "num_query_heads": 2}, 64),
        ({"num_attention_heads": None}, 128),
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 4}, 24),
        ({"kv_lora_rank": 20}, 20),
        ({"kv_lora_rank": 20, "qk_rope_head_dim": 4, "index_head_dim": 6}, 36),
        ({"model_type": "longcat_flash", "kv_lora_rank": 20, "qk_rope_head_dim": 4}, 48),
        ({"model_type": "minicpm3", "kv_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 3}, 4 * (3 + 4 + 8)),
        ({"model_type": "minicpm3", "kv_lora_rank": 20, "qk_nope_head_dim": 3, "v_head_dim": 5}, 4 * (3 + 5)),
        ({"global_head_dim": 32}, 128),
        ({"global_head_dim": 32, "num_global_key_value_heads": 1}, 128),
        ({"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}, 64),
        ({"global_head_dim": 32, "attention_k_eq_v": True}, 128),
    ],
)
def test_what_a_token_adds(keys: dict[str, Any], numbers: int) -> None:
    assert per_token(**keys) == numbers


def test_lists_say_it_layer_by_layer() -> None:
    assert per_token(num_hidden_layers=3, num_key_value_heads=[1, 2, 4]) == 16 * (1 + 2 + 4)
    assert per_token(num_hidden_layers=2, num_attention_heads=[4, 2], num_key_value_heads=None) == 64 + 2 * 32


@pytest.mark.parametrize(
    ("keys", "attending"),
    [
        ({"layer_types": ["full_attention", "mlp", "moe", "full_attention"]}, 2),
        ({"layers_block_type": ["attention", "mlp"]}, 2),
        ({"hybrid_override_pattern": "*-E-"}, 1),
        ({"block_types": ["attention", "mlp", "mlp"]}, 2),
        ({"layer_types": ["of no kind we know", "mlp"]}, 2),
        ({"full_attn_idxs": [0, 2, 3]}, 3),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3], "num_heads": 2, "head_dim": 4}}, 1),
        ({"linear_attn_config": {"kda_layers": [4], "num_heads": 2, "head_dim": 4}}, 3),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, 1),
        ({"attn_layer_period": 2}, 2),
        ({"full_attention_interval": 4}, 1),
        ({"layer_group_size": 2}, 2),
        ({"num_kv_shared_layers": 1}, 3),
        ({"num_kv_shared_layers": 3}, 1),
    ],
)
def test_which_layers_remember_every_token(keys: dict[str, Any], attending: int) -> None:
    assert per_token(num_hidden_layers=4, **keys) == 32 * attending


ROTATING = {"model_type": "llama", "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("keys", "full"),
    [
        ({"sliding_window": 300, "layer_types": ["sliding_attention", "full_attention"]}, 2),
        ({"sliding_window": 300, "layer_types": ["chunked_attention", "full_attention"]}, 2),
        ({"sliding_window": 300, "sliding_window_pattern": 4}, 1),
        ({"sliding_window": 300, "sliding_window_pattern": "LLLG"}, 1),
        ({"sliding_window": 300, "sliding_window_pattern": "LG"}, 2),
        ({"sliding_window": 300, "model_type": "gpt_oss"}, 2),
        ({"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]}, 4),
        ({"sliding_window": 300}, 4),
        ({"sliding_window": 300, "model_type": "of no family", "sliding_window_pattern": 4}, 4),
        ({"attention_window_size": 300, "model_type": "recurrent_gemma"}, 0),
    ],
)
def test_windows_bound_what_a_layer_keeps(keys: dict[str, Any], full: int) -> None:
    """In the families whose windows rotate: the window's tokens, however long the text."""
    said = {**ROTATING, **keys}
    assert cache(10 * STEP, **said) == full * 10 * STEP * TOKEN + (4 - full) * 300 * TOKEN
    assert cache(1, **said) == 4 * STEP * TOKEN, "a short text is within the window"


def test_a_chunked_cache_grows_by_a_step_before_it_is_cut() -> None:
    chunks = {"model_type": "llama4", "num_hidden_layers": 4, "attention_chunk_size": 300}
    assert cache(10 * STEP, **chunks) == 10 * STEP * TOKEN + 3 * (300 + STEP) * TOKEN


def test_a_wide_head_is_that_of_layers_that_see_everything() -> None:
    said = {**ROTATING, "sliding_window": 300, "sliding_window_pattern": 4, "global_head_dim": 16}
    assert cache(10 * STEP, **said) == 10 * STEP * 2 * TOKEN + 3 * 300 * TOKEN


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        # Mamba: inner = 2 * 32 channels, each with its state and the 3 columns behind the convolution.
        ({"state_size": 16}, 64 * (16 + 3)),
        ({"ssm_state_size": 16, "conv_kernel": 3}, 64 * (16 + 2)),
        ({"mamba_d_state": 16, "mamba_d_conv": 2, "mamba_expand": 3}, 96 * (16 + 1)),
        ({"d_state": 16, "d_conv": 2, "expand": 4}, 128 * (16 + 1)),
        ({"state_size": 16, "d_inner": 10}, 10 * (16 + 3)),
        # Mamba 2: heads with a state each; the convolution runs over groups as well.
        ({"state_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 2}, 32 * 16 + 3 * (32 + 2 * 2 * 16)),
        ({"mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}, 32 * 16 + 3 * (32 + 32)),
        ({"state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_group": 1}, 32 * 16 + 3 * (32 + 32)),
        # Gated delta nets: keys times values by head, and a convolution over both kinds.
        (
            {
                "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                "linear_value_head_dim": 6, "linear_conv_kernel_dim": 5,
            },
            4 * 8 * 6 + 4 * (2 * 2 * 8 + 4 * 6),
        ),
        ({"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}, 192 + 3 * (64 + 24)),
        ({"linear_attn_config": {"num_heads": 2, "head_dim": 4}}, 2 * 16 + 3 * 3 * 8),
        ({"linear_attn_config": {"num_heads": 2, "head_dim": 4, "short_conv_kernel_size": 2}}, 2 * 16 + 3 * 8),
        ({"conv_L_cache": 3}, 2 * 32),
        ({"lru_width": 10, "conv1d_width": 4}, 10 * 4),
        # Linear attention of which no more is known: a square by head, and two vectors beside.
        ({}, 4 * 64 + 64),
        ({"num_heads": 2, "num_attention_heads": None, "head_dim": 5}, 2 * 25 + 64),
    ],
)  # fmt: skip
def test_what_a_state_holds(keys: dict[str, Any], numbers: int) -> None:
    """In fp32, whatever the length of the text."""
    said = {"layer_types": ["mamba"], **keys}
    assert cache(1, **said) == cache(100_000, **said) == 4 * numbers


def test_a_family_of_states_keeps_no_tokens_and_one_with_both_keeps_both() -> None:
    state = 4 * 64 * (16 + 3)
    assert cache(model_type="mamba", state_size=16) == state
    assert cache(model_type="falcon_h1", state_size=16) == state + STEP * TOKEN


def test_the_text_model_of_a_nested_config_counts() -> None:
    assert kv_cache_bytes({"hidden_size": 1, "text_config": PLAIN}, 1) == cache(1)
    nested = {"text_config": {"hidden_size": 32, "vocab_size": 10, "intermediate_size": 50}}
    assert activation_bytes(nested, 1) == (8 * 32 + 3 * 50) * 2 + 80


@pytest.mark.parametrize(
    ("keys", "widths"),
    [
        ({"hidden_size": 32, "intermediate_size": 50}, 8 * 32 + 3 * 50),
        ({"n_embd": 32, "n_inner": 50}, 8 * 32 + 3 * 50),
        ({"d_model": 32, "ffn_dim": 50}, 8 * 32 + 3 * 50),
        ({"model_dim": 32}, 8 * 32 + 3 * 128),
        ({"hidden_size": 32, "intermediate_size": 50, "moe_intermediate_size": 20, "num_experts_per_tok": 4}, 496),
        ({"hidden_size": 32, "intermediate_size": 50, "moe_intermediate_size": 20, "num_experts_per_tok": 2}, 406),
        ({"hidden_size": 32, "intermediate_size": 10, "moe_intermediate_size": 20}, 8 * 32 + 3 * 20),
    ],
)
def test_one_layer_works_on_a_chunk_at_a_time(keys: dict[str, Any], widths: int) -> None:
    assert activation_bytes(keys, 100) == 100 * widths * 2
    assert activation_bytes({**keys, "vocab_size": 1000}, 100) == 100 * widths * 2 + 8000
    assert activation_bytes(keys, 10**6) == PREFILL_STEP * widths * 2
