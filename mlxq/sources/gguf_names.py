"""GGUF's names and metadata in Hugging Face terms, one ``Layout`` per architecture.

What llama.cpp's ``convert_hf_to_gguf.py`` does to each architecture is undone here: names, the row order of
llama's query and key projections, the one added to Gemma's norms, and the keys of ``config.json``. What is known of
the families themselves is in ``mlxq.families``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mlxq.errors import BadInputError
from mlxq.families import family_named
from mlxq.sources.gguf_header import ROPE_FREQUENCIES, GGUFHeader
from mlxq.sources.gguf_tokenizer import end_token_ids

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_DENSE = _ATTENTION | _TWO_NORMS | _MLP
_ROPE_SCALINGS = frozenset({"linear", "yarn", "llama3"})


@dataclass(frozen=True)
class Layout:
    """How GGUF files lay out one architecture. ``layer`` maps ``blk.N.<key>`` to ``model.layers.N.<value>``.

    ``permuted``: rows of q_proj and k_proj are stored interleaved. ``shifted_norms``: norms are stored plus one.
    ``rope_scalings``: the kinds mlx-lm computes. ``settings``: entries of config.json that are the same for every
    model of the family; ``entries`` are functions that read further ones from a file.
    """

    model_type: str
    class_name: str
    layer: dict[str, str]
    permuted: bool = False
    shifted_norms: bool = False
    rope_scalings: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)
    entries: tuple[Callable[[_Metadata], dict[str, Any]], ...] = ()


_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def layout_of(header: GGUFHeader) -> Layout:
    """The layout of a file, or BadInputError naming its architecture and the supported ones."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in LAYOUTS:
        raise BadInputError(
            f"{header.path} has architecture {architecture!r}, which can't be rebuilt from GGUF",
            f"Supported: {', '.join(LAYOUTS)}. For others, quantize the original model from the Hub.",
        )
    return LAYOUTS[architecture]


def checkpoint_name(header: GGUFHeader, layout: Layout, name: str) -> str:
    """The Hugging Face name of a stored tensor; BadInputError where the family has no such tensor."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if name == "output.weight" and family_named(layout.model_type).own_head:
        return "lm_head.weight"
    found = _BLOCK.fullmatch(name)
    if found and found[2] in layout.layer:
        return f"model.layers.{int(found[1])}.{layout.layer[found[2]]}.{found[3]}"
    raise BadInputError(
        f"{header.path} holds tensor {name!r}, which no {layout.model_type} model of mlx-lm has",
        "Quantize the original model from the Hub instead.",
    )


def config_of(header: GGUFHeader, layout: Layout, rope_frequencies: Sequence[float] | None) -> dict[str, Any]:
    """``config.json`` from metadata and tensor shapes.

    ``rope_frequencies`` are the values of ``rope_freqs.weight``, by which llama3 divides each rope frequency.
    Raises BadInputError where a key that the model needs is missing, or says what mlx-lm does not compute.
    """
    meta = _Metadata(header)
    heads, head_dim = _heads(meta), _head_dim(meta)
    hidden = meta.whole("embedding_length")
    meta.refuse_unless("attention.value_length", head_dim, "the width of its keys")
    meta.refuse_unless("rope.dimension_count", head_dim, "the width of its heads")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BadInputError(f"{header.path} has no token embedding", "Name the file with the language model's weights.")
    ends = end_token_ids(header.metadata)
    config = {
        "architectures": [layout.class_name],
        "model_type": layout.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": meta.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": meta.whole("context_length"),
        "vocab_size": embedding.shape[0],
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
        # Quantized blocks do not say what they were made from; the models of these families are published in bf16.
        "torch_dtype": "float16" if any(t.ggml_type == "F16" for t in header.tensors.values()) else "bfloat16",
        **layout.settings,
        **_width_of_mlp(meta),
        **{key: value for read in layout.entries for key, value in read(meta).items()},
    }
    scaling = _rope_scaling(meta, layout, config, rope_frequencies)
    return {key: value for key, value in config.items() if value is not None} | scaling


def permutation_width(name: str, config: dict[str, Any]) -> int:
    """Head dimension by which a q_proj or k_proj tensor is interleaved; 0 for other tensors."""
    return int(config["head_dim"]) if ".self_attn.q_proj." in name or ".self_attn.k_proj." in name else 0


@dataclass(frozen=True)
class _Metadata:
    """The ``<architecture>.*`` keys, checked as they are read."""

    header: GGUFHeader

    def get(self, key: str) -> Any:
        full = f"{self.header.metadata['general.architecture']}.{key}"
        value = self.header.metadata.get(full)
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                raise self.bad(f"{full} differs from layer to layer")
            value = value[0]
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.bad(f"{full} is {value!r}, not a number")
        if value is not None and not math.isfinite(value):
            raise self.bad(f"{full} is {value}")
        return value

    def number(self, key: str, otherwise: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = otherwise
        if value is None:
            raise self.bad(f"its metadata lacks {self.header.metadata['general.architecture']}.{key}")
        return float(value)

    def layers(self) -> int:
        """``block_count``, held against the count of tensors: each layer has at least one."""
        count = self.whole("block_count")
        if count > len(self.header.tensors):
            raise self.bad(f"it says it has {count:,} layers, and holds {len(self.header.tensors):,} tensors")
        return count

    def whole(self, key: str, otherwise: int | None = None) -> int:
        value = self.number(key, otherwise)
        if value < 1 or value != int(value):
            raise self.bad(f"{self.header.metadata['general.architecture']}.{key} is {value:g}")
        return int(value)

    def text(self, key: str) -> str | None:
        value = self.header.metadata.get(f"{self.header.metadata['general.architecture']}.{key}")
        return value if isinstance(value, str) else None

    def refuse_unless(self, key: str, expected: int, what: str) -> None:
        value = self.get(key)
        if value is not None and value != expected:
            raise self.bad(f"{key} is {value}, not {what}, {expected}, as mlx-lm computes it")

    def bad(self, reason: str) -> BadInputError:
        return BadInputError(
            f"{self.header.path} can't be rebuilt: {reason}", "Quantize the original model from the Hub instead."
        )


def _width_of_mlp(meta: _Metadata) -> dict[str, Any]:
    """Width of the feed-forward part; a file of experts alone may leave the dense one out."""
    experts = meta.header.tensors.get("blk.0.ffn_up_exps.weight")
    if experts is None:
        if meta.get("expert_count"):
            raise meta.bad("it has experts in a layout that is not supported")
        return {"intermediate_size": meta.whole("feed_forward_length")}
    return {"intermediate_size": meta.whole("feed_forward_length", experts.shape[-2])}


def _head_dim(meta: _Metadata) -> int:
    return meta.whole("attention.key_length", meta.whole("embedding_length") // max(_heads(meta), 1))


def _heads(meta: _Metadata) -> int:
    return meta.whole("attention.head_count")


def _biases(meta: _Metadata) -> dict[str, Any]:
    tensors = meta.header.tensors
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}


def _experts(meta: _Metadata) -> dict[str, Any]:
    experts = meta.header.tensors.get("blk.0.ffn_up_exps.weight")
    if experts is None or len(experts.shape) != 3:
        raise meta.bad("it has no stacked experts (blk.0.ffn_up_exps.weight)")
    return {
        "num_experts": meta.whole("expert_count"),
        "num_experts_per_tok": meta.whole("expert_used_count"),
        "moe_intermediate_size": meta.whole("expert_feed_forward_length", experts.shape[1]),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _shared_expert(meta: _Metadata) -> dict[str, Any]:
    shared = meta.header.tensors.get("blk.0.ffn_up_shexp.weight")
    if shared is None:
        raise meta.bad("it has no shared expert (blk.0.ffn_up_shexp.weight)")
    return {"shared_expert_intermediate_size": shared.shape[0]}


def _query_scale(meta: _Metadata, largest: int) -> dict[str, Any]:
    """No key holds the query scale; llama.cpp too knows the 27B models by their number of layers, ``largest``."""
    is_largest = meta.whole("block_count") == largest
    return {"query_pre_attn_scalar": meta.whole("embedding_length") // _heads(meta) if is_largest else _head_dim(meta)}


def _softcaps(meta: _Metadata) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": meta.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.number("final_logit_softcapping", 30.0),
        "sliding_window": meta.whole("attention.sliding_window", 4096),
    }


def _two_ropes(meta: _Metadata) -> dict[str, Any]:
    return {
        "sliding_window": meta.whole("attention.sliding_window", 1024),
        "rope_theta": meta.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": meta.number("rope.freq_base_swa", 10_000.0),
    }


def _rope_scaling(
    meta: _Metadata, layout: Layout, config: dict[str, Any], frequencies: Sequence[float] | None
) -> dict[str, Any]:
    """``{"rope_scaling": ...}``, or {} where rope is not scaled."""
    kind = meta.text("rope.scaling.type") or "none"
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 1.0))
    scaling: dict[str, Any] | None = None
    if frequencies is not None:
        scaling = _llama3_scaling(meta, config, frequencies)
    elif kind == "linear" or (kind == "none" and factor != 1):
        scaling = {"rope_type": "linear", "type": "linear", "factor": factor}
    elif kind == "yarn":
        original = meta.whole("rope.scaling.original_context_length")
        scaling = {
            "rope_type": "yarn",
            "type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    elif kind != "none":
        raise meta.bad(f"its rope scaling {kind!r} is not supported")
    if scaling is None:
        return {}
    if scaling["rope_type"] not in layout.rope_scalings:
        raise meta.bad(f"mlx-lm's {layout.model_type} has no {scaling['rope_type']} rope scaling")
    return {"rope_scaling": scaling}


def _llama3_scaling(meta: _Metadata, config: dict[str, Any], frequencies: Sequence[float]) -> dict[str, Any] | None:
    """The llama3 parameters whose factors are ``frequencies``, or None where all are one.

    The factors alone are stored. Every released model has low and high frequency factors 1 and 4; the largest
    factor is the scaling factor, and the original context is the one that gives the factors back.
    """
    if not all(math.isfinite(value) and value > 0 for value in frequencies) or config["rope_theta"] <= 0:
        raise meta.bad("its rope frequencies are no positive numbers")
    factor = max(frequencies, default=1)
    if factor == min(frequencies, default=1) == 1:
        return None
    if len(frequencies) != config["head_dim"] // 2:
        raise meta.bad(f"{ROPE_FREQUENCIES} holds {len(frequencies):,} factors for heads of {config['head_dim']:,}")
    for original in (8192, 4096, 16384, 2048, 32768, 65536, 131072):
        scaling = {
            "rope_type": "llama3",
            "type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = llama3_factors(scaling, config["rope_theta"], config["head_dim"])
        if all(math.isclose(one, other, rel_tol=1e-4) for one, other in zip(expected, frequencies, strict=True)):
            return scaling
    raise meta.bad(f"the factors in {ROPE_FREQUENCIES} follow no known rope scaling")


def llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> list[float]:
    """What llama3 rope scaling divides each of the ``head_dim / 2`` frequencies by.

    Formula: ``transformers.modeling_rope_utils._compute_llama3_parameters``.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    factors = []
    for pair in range(head_dim // 2):
        turns = original * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return factors


_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_SILU = {"hidden_act": "silu"}

LAYOUTS: dict[str, Layout] = {
    "llama": Layout(
        "llama",
        "LlamaForCausalLM",
        _DENSE,
        permuted=True,
        rope_scalings=_ROPE_SCALINGS,
        settings=_SILU,
        entries=(_biases,),
    ),
    "qwen2": Layout("qwen2", "Qwen2ForCausalLM", _DENSE, rope_scalings=_ROPE_SCALINGS, settings=_SILU),
    "qwen3": Layout("qwen3", "Qwen3ForCausalLM", _DENSE | _QK_NORMS, rope_scalings=_ROPE_SCALINGS, settings=_SILU),
    "qwen2moe": Layout(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        _ATTENTION | _TWO_NORMS | _EXPERTS | _SHARED_EXPERT,
        settings=_SILU | {"norm_topk_prob": False},
        entries=(_experts, _shared_expert),
    ),
    # llama.cpp always normalizes the chosen experts' weights here, and no file says otherwise.
    "qwen3moe": Layout(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        _ATTENTION | _TWO_NORMS | _QK_NORMS | _EXPERTS,
        settings=_SILU | {"norm_topk_prob": True},
        entries=(_experts,),
    ),
    "gemma": Layout("gemma", "GemmaForCausalLM", _DENSE, shifted_norms=True, settings=_GELU),
    "gemma2": Layout(
        "gemma2",
        "Gemma2ForCausalLM",
        _ATTENTION | _FOUR_NORMS | _MLP,
        shifted_norms=True,
        settings=_GELU,
        entries=(partial(_query_scale, largest=46), _softcaps),
    ),
    "gemma3": Layout(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _ATTENTION | _FOUR_NORMS | _QK_NORMS | _MLP,
        shifted_norms=True,
        rope_scalings=frozenset({"linear"}),
        settings=_GELU | {"sliding_window_pattern": family_named("gemma3_text").global_every},
        entries=(partial(_query_scale, largest=62), _two_ropes),
    ),
}
