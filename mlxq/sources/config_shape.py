"""What ``config.json`` must look like before anything is reckoned from it: shapes, and numbers that the files bear out.

A config is a stranger's: where it says that a model has 10^9 layers, whoever believes it runs a loop as long. A layer
has at least one tensor, so the count of tensors is the most layers there can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxq.errors import BadInputError

_LAYER_COUNTS = (
    "num_hidden_layers",
    "n_layers",
    "n_layer",
    "num_layers",
    "num_transformer_layers",
    "num_kv_shared_layers",
    "num_nextn_predict_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
# One entry for each layer, or for a few that repeat.
_LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "_block_types", "full_attn_idxs", "kda_layers")
_PATTERN = "hybrid_override_pattern"
_PERIODS = (
    "attn_layer_period",
    "full_attention_interval",
    "layer_group_size",
    "sliding_window_pattern",
    "global_attn_every_n_layers",
)
_OBJECTS = (
    "quantization",
    "quantization_config",
    "text_config",
    "llm_config",
    "language_config",
    "vision_config",
    "audio_config",
    "ffn_config",
    "linear_attn_config",
)
_TEXTS = ("model_type", "torch_dtype", "dtype", "model_file", "quant_method")
# Loops as long are no matter, and what such a config lacks is said better by who opens the model.
_FEW_LAYERS = 1000
# No dimension of a model is larger; MLX counts them in 32 bits.
_MAX_NUMBER = 1 << 53
# Objects in objects that configs have, with some to spare.
_MAX_DEPTH = 16


def check_config(config: Mapping[str, Any], tensor_count: int, where: str) -> None:
    """Raise BadInputError naming ``where`` and the key for what is not what it must be in a config.

    ``tensor_count`` is how many tensors the files hold.
    """
    _check(config, tensor_count, where, _MAX_DEPTH)
    kinds = config.get("architectures")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise _not(where, "architectures", kinds, "a list of names")


def _check(config: Mapping[str, Any], tensor_count: int, where: str, depth: int) -> None:
    if depth == 0:
        raise BadInputError(f"{where}: its objects are nested too deeply")
    for key, value in config.items():
        if value is None:
            continue
        if key in _LAYER_COUNTS:
            _check_count(key, value, tensor_count, where)
        elif key in _LAYER_LISTS and not isinstance(value, list):
            raise _not(where, key, value, "a list")
        elif key in _OBJECTS and not isinstance(value, Mapping):
            raise _not(where, key, value, "an object")
        elif key in _TEXTS and not isinstance(value, str):
            raise _not(where, key, value, "a text")
        elif key in _PERIODS and any(isinstance(n, int) and n < 1 for n in _each(value)):
            raise _not(where, key, value, "1 or more")
        elif key == _PATTERN and not isinstance(value, str | list):
            raise _not(where, key, value, "a pattern of layers")
        if isinstance(value, Mapping):
            _check(value, tensor_count, f"{where}: {key}", depth - 1)
        elif any(isinstance(n, int) and abs(n) > _MAX_NUMBER for n in _each(value)):
            raise BadInputError(f"{where}: {key} holds a number that no model can have")


def _check_count(key: str, value: object, tensor_count: int, where: str) -> None:
    counts = _each(value)
    if not counts or any(type(count) is not int or count < 0 for count in counts):
        raise _not(where, key, value, "a count of layers")
    count = max(counts)
    if count > max(tensor_count, _FEW_LAYERS):
        raise BadInputError(
            f"{where}: {key} is {count:,}, and the files hold {tensor_count:,} tensors, fewer than one a layer",
            "The config is of another model, or the weights are incomplete.",
        )


def _each(value: object) -> list[Any]:
    """The items of a list, or the value itself: some configs list what others say once."""
    return value if isinstance(value, list) else [value]


def _not(where: str, key: str, value: object, wanted: str) -> BadInputError:
    shown = repr(value) if isinstance(value, str | int | float | bool) else f"of type {type(value).__name__}"
    return BadInputError(f"{where}: {key} is {shown[:60]}, not {wanted}")
