"""What ``config.json`` says, under the many names that it has for it; needs neither MLX nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxq.families import FAMILIES, Family
from mlxq.tensors import DTYPE_BY_NAME

# Where the config of a model of several parts has that of its language model.
_NESTED = ("text_config", "llm_config", "language_config")


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of the model that ``config`` describes, else that of its language model, else what nothing is known of.

    The model as a whole comes first: it may run its language model otherwise than that would run alone.
    """
    nested = [config[key].get("model_type") for key in _NESTED if isinstance(config.get(key), Mapping)]
    return next((FAMILIES[name] for name in (config.get("model_type"), *nested) if name in FAMILIES), Family())


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config: nested ones (``text_config``, ``llm_config``) over the outer."""
    merged = dict(config)
    for key in _NESTED:
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


def context_length(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model was made to read at once, as the config has it (of the language model), or None."""
    return first_int(
        text_config(config),
        "max_position_embeddings",
        "n_positions",
        "max_sequence_length",
        "max_seq_len",
        "seq_length",
        "n_ctx",
    )


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Number of layers as the config has it (of the language model), or None."""
    config = text_config(config)
    pattern = config.get("hybrid_override_pattern")
    if pattern:
        return len(pattern)
    return first_int(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers", "num_transformer_layers")


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype ``mlx_lm`` casts to where nothing else is said: ``torch_dtype``, else the text
    model's ``dtype``.
    """
    nested = config.get("text_config")
    declared = config.get("torch_dtype") or (nested.get("dtype") if isinstance(nested, Mapping) else None)
    return declared if declared in DTYPE_BY_NAME else None


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


def active_share(config: Mapping[str, Any]) -> float:
    """Share of the routed experts that one token passes through; 1 where the config does not say."""
    used, all_of_them = experts_per_token(config), experts(config)
    return used / all_of_them if used and all_of_them else 1.0


def ties_head(config: Mapping[str, Any], *, has_head: bool) -> bool:
    """Whether the token embedding also serves as the head, as far as config and stored tensors tell.

    The config's word (of the language model, else of the whole) counts; where it has none, a model that stores no
    head of its own has none. Some families never have one. ``has_head`` says whether one is stored.
    """
    if not family_of(config).own_head:
        return True
    stated = text_config(config).get("tie_word_embeddings")
    return not has_head if stated is None else bool(stated)
