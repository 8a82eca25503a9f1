"""What a model keeps of the tokens it has seen, and what it works with, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlxq.architecture.config import experts_per_token, family_of, first_int, layer_count, text_config
from mlxq.families import Family

# mlx_lm caches grow by this many tokens, and prompts are read in chunks of this many.
CACHE_STEP = 256
PREFILL_STEP = 2048
# Caches are kept in the 16 bits of the activations, and states, to be on the safe side, in fp32.
_CACHE_ITEM_BYTES = 2
_STATE_ITEM_BYTES = 4

# What configs call the kinds of layers -> full: every token; sliding: the last ones; state: constant; none.
_KINDS = {
    "full_attention": "full",
    "attention": "full",
    "global_attention": "full",
    "*": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "state",
    "mamba": "state",
    "mamba2": "state",
    "recurrent": "state",
    "conv": "state",
    "M": "state",
    "mlp": "none",
    "moe": "none",
    "-": "none",
    "E": "none",
}


def kv_cache_bytes(config: Mapping[str, Any], context: int) -> int:
    """Bytes of ``mlx_lm``'s prompt cache after ``context`` tokens of one sequence, in 16 bits.

    Per layer, by its kind, with T = context rounded up to ``CACHE_STEP``:

    - attention: T * kv_heads * (head_dim + v_head_dim);
    - latent attention (``kv_lora_rank``): T * (kv_lora_rank + qk_rope_head_dim), plus 2 * T * index_head_dim
      where it has an indexer; in families whose latent ``mlx_lm`` caches expanded, T * heads * (qk_nope_head_dim +
      qk_rope_head_dim + v_head_dim);
    - sliding attention, in the families that ``mlx_lm`` keeps rotating caches for: as attention, with T at
      most the window, and one step more where they are chunked;
    - state-space, linear attention and short convolutions: constant, counted in fp32 (an upper bound);
    - layers that share another's cache (``num_kv_shared_layers``), MLP-only layers: nothing.
    """
    family, config = family_of(config), text_config(config)
    total = 0
    for index, kind in enumerate(_layer_kinds(config, family)):
        if kind == "state" or family.state_beside_attention:
            total += _STATE_ITEM_BYTES * _state_numbers(config)
        if kind == "full":
            total += _stepped(context) * _attention_numbers(config, family, index, sliding=False) * _CACHE_ITEM_BYTES
        if kind == "sliding":
            most = (_window(config, family) or context) + (CACHE_STEP if family.chunked else 0)
            tokens = min(_stepped(context), most)
            total += tokens * _attention_numbers(config, family, index, sliding=True) * _CACHE_ITEM_BYTES
    return total


def _stepped(context: int) -> int:
    return math.ceil(context / CACHE_STEP) * CACHE_STEP


def _layer_kinds(config: Mapping[str, Any], family: Family) -> list[str]:
    """What each layer remembers: ``full``, ``sliding``, ``state`` or ``none``."""
    count = layer_count(config) or 0
    kinds = _stated_kinds(config, count) or _patterned_kinds(config, family, count)
    if family.windowed_attention:
        kinds = ["sliding" if kind == "full" else kind for kind in kinds]
    if not family.rotating or not _window(config, family):
        kinds = ["full" if kind == "sliding" else kind for kind in kinds]
    shared = first_int(config, "num_kv_shared_layers") or 0
    return [kind if index < count - shared else "none" for index, kind in enumerate(kinds)]


def _stated_kinds(config: Mapping[str, Any], count: int) -> list[str] | None:
    """Kinds from configs that list them layer by layer; a shorter list repeats."""
    for key in ("layer_types", "layers_block_type", "hybrid_override_pattern", "block_types", "_block_types"):
        stated = config.get(key)
        if stated:
            return [_KINDS.get(str(stated[index % len(stated)]), "full") for index in range(count)]
    return None


def _patterned_kinds(config: Mapping[str, Any], family: Family, count: int) -> list[str]:
    """Kinds from configs that give a rule."""
    layers = range(count)
    if family.all_state:
        return ["state"] * count
    if (indices := config.get("full_attn_idxs")) is not None:
        return ["full" if index in indices else "state" for index in layers]
    linear = config.get("linear_attn_config")
    if isinstance(linear, Mapping) and (numbers := linear.get("kda_layers")) is not None:
        # Counted from one.
        return ["state" if index + 1 in numbers else "full" for index in layers]
    if (period := first_int(config, "attn_layer_period")) is not None:
        offset = first_int(config, "attn_layer_offset") or 0
        return ["full" if index % period == offset else "state" for index in layers]
    if (interval := first_int(config, "full_attention_interval", "layer_group_size")) is not None:
        return ["full" if (index + 1) % interval == 0 else "state" for index in layers]
    pattern = config.get("sliding_window_pattern") or family.global_every
    if isinstance(pattern, str):
        return ["full" if pattern[index % len(pattern)] == "G" else "sliding" for index in layers]
    if isinstance(pattern, int):
        return ["full" if (index + 1) % pattern == 0 else "sliding" for index in layers]
    return ["full"] * count


def _window(config: Mapping[str, Any], family: Family) -> int | None:
    return first_int(config, *family.window_keys)


def _attention_numbers(config: Mapping[str, Any], family: Family, index: int, *, sliding: bool) -> int:
    """Numbers that layer ``index`` caches for one token."""
    heads = _of_layer(config, index, "num_attention_heads", "n_heads", "n_head", "num_heads", "num_query_heads") or 1
    rank, rope = first_int(config, "kv_lora_rank"), first_int(config, "qk_rope_head_dim") or 0
    if rank:
        if family.expanded_latent:
            nope = first_int(config, "qk_nope_head_dim") or 0
            values = first_int(config, "v_head_dim") or (first_int(config, "hidden_size") or 0) // heads
            return heads * (nope + rope + values)
        indexer = 2 * (first_int(config, "index_head_dim") or 0)
        return (rank + rope + indexer) * family.attentions_per_layer
    kv_heads = _of_layer(config, index, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv") or heads
    if config.get("multi_query"):
        kv_heads = 1
    width = first_int(config, "hidden_size", "n_embd", "model_dim", "d_model") or 0
    head_dim = first_int(config, "head_dim", "attention_head_dim") or width // heads
    value_dim = first_int(config, "v_head_dim") or head_dim
    if not sliding and (wide := first_int(config, "global_head_dim")):
        head_dim = value_dim = wide
        if config.get("attention_k_eq_v"):
            kv_heads = first_int(config, "num_global_key_value_heads") or kv_heads
    return kv_heads * (head_dim + value_dim)


def _of_layer(config: Mapping[str, Any], index: int, *keys: str) -> int | None:
    """As ``first_int``, but of a list that has an entry per layer take that of layer ``index``."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and index < len(value) and isinstance(value[index], int):
            return int(value[index])
        if isinstance(value, int):
            return value
    return None


def _state_numbers(config: Mapping[str, Any]) -> int:
    """Numbers that one recurrent layer keeps: its state and the tail of its convolution."""
    width = first_int(config, "hidden_size", "d_model") or 0
    tail = (
        first_int(config, "conv_kernel", "mamba_d_conv", "d_conv", "linear_conv_kernel_dim", "conv1d_width") or 4
    ) - 1
    if (value_heads := first_int(config, "linear_num_value_heads")) is not None:
        keys, values = (
            first_int(config, "linear_key_head_dim") or 0,
            first_int(config, "linear_value_head_dim") or 0,
        )
        key_heads = first_int(config, "linear_num_key_heads") or value_heads
        return value_heads * keys * values + tail * (2 * key_heads * keys + value_heads * values)
    if isinstance(linear := config.get("linear_attn_config"), Mapping):
        heads, dim = first_int(linear, "num_heads") or 0, first_int(linear, "head_dim") or 0
        return heads * dim * dim + 3 * ((first_int(linear, "short_conv_kernel_size") or 4) - 1) * heads * dim
    if (kept := first_int(config, "conv_L_cache")) is not None:
        return (kept - 1) * width
    if (lru := first_int(config, "lru_width")) is not None:
        return lru * (1 + tail)
    state = first_int(config, "ssm_state_size", "state_size", "mamba_d_state", "d_state")
    if state is None:
        heads = first_int(config, "num_attention_heads", "num_heads") or 1
        dim = first_int(config, "head_dim") or width // heads
        return heads * dim * dim + 2 * width
    heads = first_int(config, "mamba_num_heads", "mamba_n_heads", "num_heads") or 0
    dim = first_int(config, "mamba_head_dim", "mamba_d_head", "head_dim") or 0
    groups = first_int(config, "n_groups", "mamba_n_groups", "n_group")
    if heads and groups is not None:
        return heads * dim * state + tail * (heads * dim + 2 * groups * state)
    expand = first_int(config, "expand", "mamba_expand") or 2
    inner = first_int(config, "d_inner") or expand * width
    return inner * (state + tail)


def activation_bytes(config: Mapping[str, Any], context: int) -> int:
    """Working memory of one prefill chunk.

    Of a chunk of at most ``PREFILL_STEP`` tokens, one layer's hidden states, projections (8 widths) and MLP
    (3 inner widths, times the experts of a token) are alive at once, in 16 bits; and one row of fp32 logits,
    twice.
    """
    config = text_config(config)
    width = first_int(config, "hidden_size", "n_embd", "d_model", "model_dim") or 0
    inner = first_int(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * width
    if (expert := first_int(config, "moe_intermediate_size")) is not None:
        inner = max(inner, expert * (experts_per_token(config) or 1))
    logits = 8 * (first_int(config, "vocab_size") or 0)
    return min(context, PREFILL_STEP) * (8 * width + 3 * inner) * 2 + logits
