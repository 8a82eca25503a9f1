"""Does a model fit a machine: weights + KV cache + overhead, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.machine.devices import Device
from mlxq.methods.formats import Format
from mlxq.recipe.match import assign
from mlxq.tensors import DTYPE_BY_NAME, FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    from mlxq.architecture.inspection import InspectedModule, Inspection
    from mlxq.recipe.load import Recipe

# mlx_lm caches grow by this many tokens, and prompts are read in chunks of this many.
CACHE_STEP = 256
PREFILL_STEP = 2048
# Python, MLX and Metal with their kernels and buffers, before any weight.
BASE_OVERHEAD_BYTES = 300_000_000

# Families whose sliding layers mlx_lm keeps in a cache of the window's size. The others keep every token,
# whatever their config says of windows. (`make_cache` of mlx_lm.models, 0.32.)
_ROTATING = frozenset(
    [
        "afmoe",
        "cohere2",
        "exaone4",
        "exaone_moe",
        "gear",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "gemma4",
        "gemma4_text",
        "gpt_oss",
        "laguna",
        "llama",
        "llama4",
        "llama4_text",
        "mellum",
        "mimo_v2_flash",
        "ministral3",
        "mistral",
        "mistral3",
        "muse_glimmer",
        "muse_spark",
        "olmo3",
        "plamo3",
        "recurrent_gemma",
        "spark2_5",
        "step3p5",
    ]
)
# One global layer after so many, where the config does not say.
_DEFAULT_PATTERN = {
    "gemma3": 6,
    "gemma3_text": 6,
    "cohere2": 4,
    "olmo3": 4,
    "gpt_oss": 2,
    "llama4": 4,
    "llama4_text": 4,
}
# mlx_lm expands the latent of these to full heads before it caches it.
_EXPANDED_MLA = frozenset({"deepseek_v2", "minicpm3"})
_ALL_STATE = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv7"})

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


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a device, and the most tokens/sec its memory allows when decoding. Sizes in
    bytes.
    """

    weight_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    needed_bytes: int
    usable_bytes: int
    fits: bool
    decode_tps_ceiling: float | None


@dataclass(frozen=True)
class Estimate:
    """Bytes of the weights as a recipe would write them, and how many of them each decoded token reads."""

    weight_bytes: int
    read_bytes: int


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config: nested ones (``text_config``, ``llm_config``) over the outer."""
    merged = dict(config)
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            merged.update(config[key])
    return merged


def first_int(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of ``keys`` that holds a whole number (of a list, its largest)."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            value = max(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of layers as the config has it (of the language model), or None."""
    config = text_config(config)
    pattern = config.get("hybrid_override_pattern")
    if pattern:
        return len(pattern)
    return first_int(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")


def kv_cache_bytes(config: Mapping[str, Any], context: int, *, item_bytes: int = 2) -> int:
    """Bytes of ``mlx_lm``'s prompt cache after ``context`` tokens of one sequence, ``item_bytes`` per number.

    Per layer, by its kind, with T = context rounded up to ``CACHE_STEP``:

    - attention: T * kv_heads * (head_dim + v_head_dim);
    - latent attention (``kv_lora_rank``): T * (kv_lora_rank + qk_rope_head_dim), plus 2 * T * index_head_dim
      where it has an indexer; for ``deepseek_v2`` and ``minicpm3``, which ``mlx_lm`` caches expanded,
      T * heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim);
    - sliding attention, in the families that ``mlx_lm`` keeps rotating caches for: as attention, with T at
      most the window;
    - state-space, linear attention and short convolutions: constant, counted in fp32 (an upper bound);
    - layers that share another's cache (``num_kv_shared_layers``), MLP-only layers: nothing.
    """
    config = text_config(config)
    total = 0
    for index, kind in enumerate(_layer_kinds(config)):
        if kind == "state" or config.get("model_type") == "falcon_h1":
            total += 4 * _state_numbers(config)
        if kind == "full":
            total += _stepped(context) * _attention_numbers(config, index, sliding=False) * item_bytes
        if kind == "sliding":
            tokens = min(_stepped(context), _window(config) or context)
            total += tokens * _attention_numbers(config, index, sliding=True) * item_bytes
    return total


def _stepped(context: int) -> int:
    return math.ceil(context / CACHE_STEP) * CACHE_STEP


def _layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """What each layer remembers: ``full``, ``sliding``, ``state`` or ``none``."""
    count = layer_count(config) or 0
    kinds = _stated_kinds(config, count) or _patterned_kinds(config, count)
    model_type = config.get("model_type")
    if model_type == "recurrent_gemma":
        kinds = ["sliding" if kind == "full" else kind for kind in kinds]
    if model_type not in _ROTATING or not _window(config):
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


def _patterned_kinds(config: Mapping[str, Any], count: int) -> list[str]:
    """Kinds from configs that give a rule."""
    model_type = config.get("model_type")
    layers = range(count)
    if model_type in _ALL_STATE:
        return ["state"] * count
    if (indices := config.get("full_attn_idxs")) is not None:
        return ["full" if index in indices else "state" for index in layers]
    if model_type == "kimi_linear":
        linear = config["linear_attn_config"]["kda_layers"]
        return ["state" if index + 1 in linear else "full" for index in layers]
    if (period := first_int(config, "attn_layer_period")) is not None:
        offset = first_int(config, "attn_layer_offset") or 0
        return ["full" if index % period == offset else "state" for index in layers]
    if (interval := first_int(config, "full_attention_interval", "layer_group_size")) is not None:
        return ["full" if (index + 1) % interval == 0 else "state" for index in layers]
    pattern = config.get("sliding_window_pattern") or _DEFAULT_PATTERN.get(str(model_type))
    if isinstance(pattern, str):
        return ["full" if pattern[index % len(pattern)] == "G" else "sliding" for index in layers]
    if isinstance(pattern, int):
        return ["full" if (index + 1) % pattern == 0 else "sliding" for index in layers]
    return ["full"] * count


def _window(config: Mapping[str, Any]) -> int | None:
    if str(config.get("model_type")).startswith("llama4"):
        return first_int(config, "attention_chunk_size")
    return first_int(config, "sliding_window", "sliding_window_size", "attention_window_size", "window_size")


def _attention_numbers(config: Mapping[str, Any], index: int, *, sliding: bool) -> int:
    """Numbers that layer ``index`` caches for one token."""
    heads = _of_layer(config, index, "num_attention_heads", "n_heads", "n_head", "num_heads", "num_query_heads") or 1
    model_type = str(config.get("model_type"))
    rank, rope = first_int(config, "kv_lora_rank"), first_int(config, "qk_rope_head_dim") or 0
    if rank:
        if model_type in _EXPANDED_MLA:
            nope = first_int(config, "qk_nope_head_dim") or 0
            values = first_int(config, "v_head_dim") or (first_int(config, "hidden_size") or 0) // heads
            return heads * (nope + rope + values)
        indexer = 2 * (first_int(config, "index_head_dim") or 0)
        # Each of these layers holds two attentions.
        return (rank + rope + indexer) * (2 if model_type.startswith("longcat_flash") else 1)
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
        heads, dim = int(linear["num_heads"]), int(linear["head_dim"])
        return heads * dim * dim + 3 * (int(linear.get("short_conv_kernel_size", 4)) - 1) * heads * dim
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


def overhead_bytes(config: Mapping[str, Any], context: int) -> int:
    """Memory beside weights and cache: ``BASE_OVERHEAD_BYTES`` and the activations of one prefill chunk.

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
    return BASE_OVERHEAD_BYTES + min(context, PREFILL_STEP) * (8 * width + 3 * inner) * 2 + logits


def experts(config: Mapping[str, Any]) -> int | None:
    """Routed experts of a mixture layer, or None for dense models."""
    config = _expert_config(config)
    return first_int(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or None


def experts_per_token(config: Mapping[str, Any]) -> int | None:
    """Routed experts that one token passes through, or None for dense models."""
    config = _expert_config(config)
    keys = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts", "moe_k")
    return first_int(config, *keys) or None


def _expert_config(config: Mapping[str, Any]) -> dict[str, Any]:
    config = text_config(config)
    nested = config.get("ffn_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def fit(
    weight_bytes: int,
    config: Mapping[str, Any],
    context: int,
    device: Device,
    *,
    read_bytes: int | None = None,
) -> Fit:
    """Does a model of ``weight_bytes`` run on ``device`` with ``context`` tokens?

    ``decode_tps_ceiling`` = bandwidth / (bytes read per token + the cache): the most that memory allows,
    never reached. ``read_bytes`` is what one token reads of the weights, by default all (fewer with experts).
    """
    cache, overhead = kv_cache_bytes(config, context), overhead_bytes(config, context)
    needed = weight_bytes + cache + overhead
    read = (weight_bytes if read_bytes is None else read_bytes) + cache
    ceiling = device.bandwidth / read if device.bandwidth and read else None
    usable = device.usable_bytes
    return Fit(weight_bytes, cache, overhead, needed, usable, needed <= usable, ceiling)


def estimate_bytes(inspection: Inspection, recipe: Recipe) -> int:
    """Weight bytes that ``recipe`` would write; see ``estimate``."""
    return estimate(inspection, recipe).weight_bytes


def estimate(inspection: Inspection, recipe: Recipe) -> Estimate:
    """Predict what ``recipe`` would write, from headers alone and without asking MLX what the model is.

    Exact where the checkpoint's names and shapes are those of the MLX model, else near: which modules can be
    quantized is guessed from names, and what the model itself asks for (a router at 8 bits) is not known.
    Rules that match nothing are passed over.
    """
    modules = [module for module in inspection.modules if module.kept]
    quantizable = [module for module in modules if module.quantizable]
    paths = [module.path for module in quantizable]
    decided, _ = assign(recipe.rules, paths, inspection.layer_count, inspection.tied_head)
    wanted: dict[str, Format | None] = {
        match.path: recipe.default if match.rule is None else recipe.rules[match.rule].format for match in decided
    }
    declared = recipe.dtype or declared_dtype(inspection.config)
    share = active_share(inspection.config)
    total = read = 0
    for module in modules:
        nbytes = _written_bytes(module, wanted.get(module.path), declared)
        total += nbytes
        if module.expert:
            read += round(nbytes * share)
        elif module.path != inspection.embedding or inspection.tied_embeddings:
            # Of an embedding that is not also the head, a token reads one row.
            read += nbytes
    return Estimate(total, read)


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype ``mlx_lm`` casts to where nothing else is said: ``torch_dtype``, else the text
    model's ``dtype``.
    """
    nested = config.get("text_config")
    declared = config.get("torch_dtype") or (nested.get("dtype") if isinstance(nested, Mapping) else None)
    return declared if declared in DTYPE_BY_NAME else None


def active_share(config: Mapping[str, Any]) -> float:
    """Share of the routed experts that one token passes through; 1 where the config does not say."""
    used, all_of_them = experts_per_token(config), experts(config)
    return used / all_of_them if used and all_of_them else 1.0


def _written_bytes(module: InspectedModule, wanted: Format | None, dtype: str | None) -> int:
    """Bytes of one module in ``wanted``, or in ``dtype`` where that is None or does not fit its width."""
    held = module.dtype if module.dtype in FLOAT_DTYPES else "BF16"
    if not module.castable:
        return module.parameters * module.stored_bits // 8
    weight = TensorSpec(f"{module.path}.weight", DTYPE_BY_NAME[dtype] if dtype else held, module.shape)
    fitting = wanted.fitted_to(module.shape[-1]) if wanted else None
    return sum(spec.nbytes for spec in fitting.layout(weight)) if fitting else weight.nbytes
