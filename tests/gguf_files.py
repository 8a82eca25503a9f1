"""GGUF files of small models, as llama.cpp's converter would write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as T

from mlxq.sources.base import ModelSource

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 64, 4, 2, 32, 96, 300
EXPERTS, EXPERT_WIDTH = 4, 32
Edit = Callable[[gguf.GGUFWriter], None]
Weights = npt.NDArray[np.float32]


def head_dim_of(architecture: str) -> int:
    """Wider heads than the hidden size says, except in Qwen2, which mlx-lm computes without the choice."""
    return HIDDEN // HEADS if architecture.startswith("qwen2") else HEAD_DIM


def layers_of(architecture: str) -> int:
    """Two, and for Gemma 3 one whole run of sliding layers with its full one."""
    return 6 if architecture == "gemma3" else 2


def hf_weights(architecture: str, layers: int | None = None) -> dict[str, Weights]:
    """A random checkpoint under Hugging Face names, float32 values that float16 holds."""
    rng = np.random.default_rng(0)
    head_dim = head_dim_of(architecture)

    def random(*shape: int) -> Weights:
        return rng.normal(0, 0.1, shape).astype(np.float16).astype(np.float32)

    weights = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN), "model.norm.weight": random(HIDDEN)}
    if architecture in ("llama", "qwen2moe", "qwen3moe"):
        weights["lm_head.weight"] = random(VOCABULARY, HIDDEN)
    for layer in range(layers or layers_of(architecture)):
        at = f"model.layers.{layer}"
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"{at}.self_attn.{name}_proj.weight"] = random(rows * head_dim, HIDDEN)
            if architecture.startswith("qwen2"):
                weights[f"{at}.self_attn.{name}_proj.bias"] = random(rows * head_dim)
        weights[f"{at}.self_attn.o_proj.weight"] = random(HIDDEN, HEADS * head_dim)
        if architecture in ("qwen3", "qwen3moe", "gemma3"):
            weights[f"{at}.self_attn.q_norm.weight"] = random(head_dim)
            weights[f"{at}.self_attn.k_norm.weight"] = random(head_dim)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if architecture in ("gemma2", "gemma3"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norms:
            weights[f"{at}.{name}.weight"] = random(HIDDEN)
        if architecture.endswith("moe"):
            weights[f"{at}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
            for name, shape in (
                ("gate", (EXPERT_WIDTH, HIDDEN)),
                ("up", (EXPERT_WIDTH, HIDDEN)),
                ("down", (HIDDEN, EXPERT_WIDTH)),
            ):
                weights[f"{at}.mlp.switch_mlp.{name}_proj.weight"] = random(EXPERTS, *shape)
                if architecture == "qwen2moe":
                    weights[f"{at}.mlp.shared_expert.{name}_proj.weight"] = random(*shape)
            if architecture == "qwen2moe":
                weights[f"{at}.mlp.shared_expert_gate.weight"] = random(1, HIDDEN)
        else:
            weights[f"{at}.mlp.gate_proj.weight"] = random(MLP, HIDDEN)
            weights[f"{at}.mlp.up_proj.weight"] = random(MLP, HIDDEN)
            weights[f"{at}.mlp.down_proj.weight"] = random(HIDDEN, MLP)
    return weights


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def gguf_name(architecture: str, name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, leaf = name.rpartition(".")
    if module in outside:
        return f"{outside[module]}.{leaf}"
    _, _, layer, tail = module.split(".", 3)
    late = architecture in ("gemma2", "gemma3")
    after_attention = "post_attention_norm" if late else "ffn_norm"
    return f"blk.{layer}.{(_GGUF_NAMES | {'post_attention_layernorm': after_attention})[tail]}.{leaf}"


def llama_cpp_permute(weights: Weights, heads: int) -> Weights:
    """``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    permuted: Weights = halves.swapaxes(1, 2).reshape(weights.shape)
    return permuted


def as_stored(architecture: str, name: str, weight: Weights) -> Weights:
    """What llama.cpp's converter writes for a checkpoint tensor."""
    if architecture == "llama" and ".q_proj." in name:
        return llama_cpp_permute(weight, HEADS)
    if architecture == "llama" and ".k_proj." in name:
        return llama_cpp_permute(weight, KV_HEADS)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        weight = weight + np.float32(1)
    stored: Weights = weight[0] if name.endswith("shared_expert_gate.weight") else weight
    return stored


def bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges: control tokens, all bytes, a few words, filled up to ``VOCABULARY``."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values()]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [3, 3, 3] + [1] * (len(tokens) - 3)
    tokens.append("<think>")
    types.append(4)
    while len(tokens) < VOCABULARY:
        tokens.append(f"[PAD{len(tokens)}]")
        types.append(5)
    return tokens, types, merges


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(
    path: Path,
    architecture: str = "llama",
    *,
    types: dict[str, T] | None = None,
    weights: dict[str, Weights] | None = None,
    edit: Edit | None = None,
    pre: str | None = "qwen2",
    per_part: int = 0,
) -> Path:
    """Write a two-layer model as llama.cpp's converter would; matrices are F16 unless ``types`` says otherwise.

    ``per_part`` tensors go to a file, where it is not 0: their names say which part they are.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_part)
    weights = hf_weights(architecture) if weights is None else weights
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers_of(architecture))
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_dim_of(architecture))
    writer.add_value_length(head_dim_of(architecture))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(50000.0)
    if architecture.endswith("moe"):
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(EXPERT_WIDTH)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(25.0)
        writer.add_final_logit_softcapping(15.0)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(128)
    tokens, token_types, merges = byte_level_vocabulary()
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(token_types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if edit:
        edit(writer)
    for name, weight in weights.items():
        stored = as_stored(architecture, name, weight)
        kind = (types or {}).get(name, T.F16 if stored.ndim > 1 else T.F32)
        data = gguf.quants.quantize(stored, kind)
        raw_dtype = None if kind in (T.F16, T.F32) else kind
        writer.add_tensor(gguf_name(architecture, name), data, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(source: ModelSource, name: str) -> npt.NDArray[Any]:
    spec = source.tensors[name]
    return source.read_rows(name, 0, spec.rows).reshape(spec.shape)
