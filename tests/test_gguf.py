"""GGUF as a source: names, values, config, tokenizer, exact repacking, and files that are not what they should be."""

from __future__ import annotations

import importlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import yaml
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.errors import BadInputError, MlxqError
from mlxq.methods.formats import Format
from mlxq.retry import told
from mlxq.sources.gguf import GGUFSource, open_gguf, recipe_yaml_from_gguf
from mlxq.sources.gguf_blocks import REPACKABLE, nearest_format, repack
from mlxq.sources.gguf_header import _Cursor
from mlxq.sources.gguf_names import llama3_factors
from mlxq.sources.gguf_tokenizer import end_token_ids, tokenizer_files
from mlxq.sources.resolve import resolve
from mlxq.sources.sample import SAMPLE, open_sample, sample_folder

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY = 64, 4, 2, 32, 96, 300
EXPERTS, EXPERT_WIDTH = 4, 32
Edit = Callable[[gguf.GGUFWriter], None]


def head_dim_of(architecture: str) -> int:
    """Wider heads than the hidden size says, except in Qwen2, which mlx-lm computes without the choice."""
    return HIDDEN // HEADS if architecture.startswith("qwen2") else HEAD_DIM


def layers_of(architecture: str) -> int:
    """Two, and for Gemma 3 one whole run of sliding layers with its full one."""
    return 6 if architecture == "gemma3" else 2


def hf_weights(architecture: str, layers: int | None = None) -> dict[str, np.ndarray]:
    """A random checkpoint under Hugging Face names, float32 values that float16 holds."""
    rng = np.random.default_rng(0)
    head_dim = head_dim_of(architecture)

    def random(*shape: int) -> np.ndarray:
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


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def as_stored(architecture: str, name: str, weight: np.ndarray) -> np.ndarray:
    """What llama.cpp's converter writes for a checkpoint tensor."""
    if architecture == "llama" and ".q_proj." in name:
        return llama_cpp_permute(weight, HEADS)
    if architecture == "llama" and ".k_proj." in name:
        return llama_cpp_permute(weight, KV_HEADS)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return weight + np.float32(1)
    return weight[0] if name.endswith("shared_expert_gate.weight") else weight


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
    weights: dict[str, np.ndarray] | None = None,
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


def read_all(source: GGUFSource, name: str) -> np.ndarray:
    spec = source.tensors[name]
    return source.read_rows(name, 0, spec.rows).reshape(spec.shape)


ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_comes_back_under_its_checkpoint_name(tmp_path: Path, architecture: str) -> None:
    source = open_gguf(write_gguf(tmp_path / "m.gguf", architecture), "m")
    expected = hf_weights(architecture)
    assert set(source.tensors) == set(expected)
    for name, weight in expected.items():
        assert source.tensors[name].shape == weight.shape, name
        found = read_all(source, name)
        assert found.dtype == (np.float16 if source.tensors[name].dtype == "F16" else np.float32)
        # Adding one to a norm in float32 costs its last bits, in the file already.
        np.testing.assert_allclose(found, weight, rtol=0, atol=1e-7 if "norm" in name else 0, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlx_lm_loads_what_the_source_says_and_computes_with_it(tmp_path: Path, architecture: str) -> None:
    import mlx.core as mx

    source = open_gguf(write_gguf(tmp_path / "m.gguf", architecture), "m")
    model_type = source.config["model_type"]
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    model = module.Model(module.ModelArgs.from_dict(dict(source.config)))
    weights = {name: mx.array(read_all(source, name)) for name in source.tensors}
    if hasattr(model, "sanitize"):
        assert set(model.sanitize(dict(weights))) == set(source.tensors)
    model.load_weights(list(weights.items()), strict=True)
    logits = model(mx.array([[1, 5, 9, 14]]))
    assert logits.shape == (1, 4, VOCABULARY)
    assert mx.isfinite(logits).all().item()


def test_config_in_hugging_face_terms(tmp_path: Path) -> None:
    config = open_gguf(write_gguf(tmp_path / "m.gguf", "gemma2"), "m").config
    expected = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "intermediate_size": MLP,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "sliding_window": 128,
        "attn_logit_softcapping": 25.0,
        "final_logit_softcapping": 15.0,
        "query_pre_attn_scalar": HEAD_DIM,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        # The template ends turns with <|im_end|>, which the file does not declare.
        "eos_token_id": [0, 2],
        "torch_dtype": "float16",
    }
    assert {key: config[key] for key in expected} == expected
    assert open_gguf(write_gguf(tmp_path / "l.gguf", "llama"), "l").config["tie_word_embeddings"] is False


def test_any_span_of_permuted_rows_and_biases_is_that_span_of_the_checkpoint(tmp_path: Path) -> None:
    weights = hf_weights("llama")
    rng = np.random.default_rng(1)
    for layer in range(2):
        for name, rows in (
            ("q", HEADS * HEAD_DIM),
            ("k", KV_HEADS * HEAD_DIM),
            ("v", KV_HEADS * HEAD_DIM),
            ("o", HIDDEN),
        ):
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = rng.normal(size=rows).astype(np.float32)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", weights=weights), "m")
    assert source.config["attention_bias"] is True
    name = "model.layers.1.self_attn.q_proj.weight"
    for start in range(0, HEADS * HEAD_DIM, 5):
        for stop in (start, start + 1, start + 17, start + 40, HEADS * HEAD_DIM):
            expected = weights[name][start : min(stop, HEADS * HEAD_DIM)]
            np.testing.assert_array_equal(source.read_rows(name, start, start + len(expected)), expected)
    for which in ("q", "k", "v", "o"):
        name = f"model.layers.0.self_attn.{which}_proj.bias"
        np.testing.assert_array_equal(read_all(source, name), weights[name])


def quantizable_types() -> list[T]:
    block = np.linspace(-1, 1, 256, dtype=np.float32)[None]
    found = []
    for kind in T:
        try:
            gguf.quants.quantize(block, kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


QUANTIZABLE = quantizable_types()


def test_the_gguf_package_still_quantizes_the_types_tested_below() -> None:
    assert {T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.BF16} < set(QUANTIZABLE)


@pytest.mark.parametrize("kind", QUANTIZABLE, ids=lambda kind: kind.name)
def test_rows_of_every_type_equal_the_gguf_packages_values(tmp_path: Path, kind: T) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weights = {"model.embed_tokens.weight": hf_weights("qwen2")["model.embed_tokens.weight"]}
    weights[name] = np.random.default_rng(2).normal(size=(40, 512)).astype(np.float32)
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", types={name: kind}, weights=weights), "m")
    expected = gguf.quants.dequantize(gguf.quants.quantize(weights[name], kind), kind)
    spans = [(0, 40), (0, 1), (7, 23), (39, 40)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda span: source.read_rows(name, *span), spans))
    for (start, stop), rows in zip(spans, found, strict=True):
        if kind == T.BF16:
            assert rows.dtype == np.uint16
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(rows.astype(np.float32), expected[start:stop])
    assert source.bit_map()["model.layers.0.mlp.down_proj"] == kind.name
    assert source.tensors[name].dtype == (kind.name if kind in (T.F16, T.BF16) else "F32")


def dequantized_by_mlx(parts: dict[str, np.ndarray], fmt: Format) -> np.ndarray:
    import mlx.core as mx

    values = mx.dequantize(
        mx.array(parts["weight"]),
        scales=mx.array(parts["scales"]).astype(mx.float32),
        biases=mx.array(parts["biases"]).astype(mx.float32),
        group_size=fmt.group_size,
        bits=fmt.bits,
    )
    return np.array(values)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(REPACKABLE)),
    blocks=st.integers(1, 6),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(0, 23),
)
def test_repacked_blocks_mean_the_same_numbers(kind: str, blocks: int, rows: int, seed: int, exponent: int) -> None:
    """Blocks of random bits with scales of any float16 exponent that leaves room for the offset, subnormal ones too."""
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[T[kind]][1]
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for place in range(0, 4 if kind.endswith("1") else 2, 2):
        fraction = rng.integers(0, 1024, (rows, blocks)) | (exponent << 10) | (rng.integers(0, 2, (rows, blocks)) << 15)
        raw[..., place : place + 2] = fraction.astype("<u2")[..., None].view(np.uint8)
    raw = raw.reshape(rows, -1)
    parts = repack(raw, kind, "w")
    fmt = REPACKABLE[kind]
    assert parts["weight"].dtype == np.uint32
    assert parts["weight"].shape == (rows, blocks * 32 * fmt.bits // 32)
    assert parts["scales"].dtype == parts["biases"].dtype == np.float16
    expected = gguf.quants.dequantize(raw, T[kind])
    np.testing.assert_array_equal(dequantized_by_mlx(parts, fmt), expected)


@pytest.mark.parametrize(("kind", "largest"), [("Q4_0", 8184), ("Q5_0", 4092), ("Q8_0", 511.5)])
def test_a_scale_too_large_for_its_offset_is_reported_not_written(kind: str, largest: float) -> None:
    raw = np.zeros((1, gguf.GGML_QUANT_SIZES[T[kind]][1]), dtype=np.uint8)
    raw[0, :2] = np.frombuffer(np.float16(largest).tobytes(), dtype=np.uint8)
    np.testing.assert_array_equal(
        dequantized_by_mlx(repack(raw, kind, "w"), REPACKABLE[kind]), gguf.quants.dequantize(raw, T[kind])
    )
    raw[0, :2] = np.frombuffer(np.float16(largest * 1.01).tobytes(), dtype=np.uint8)
    with pytest.raises(MlxqError, match=f"lm_head.weight: a {kind} block"):
        repack(raw, kind, "lm_head.weight")


def test_repacked_rows_of_a_permuted_projection(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    source = open_gguf(write_gguf(tmp_path / "m.gguf", types={name: T.Q5_1}), "m")
    fmt = source.repack_format(name)
    assert fmt == Format(5, 32)
    found = dequantized_by_mlx(source.read_repacked(name, 9, 50), fmt)
    np.testing.assert_array_equal(found, source.read_rows(name, 9, 50))
    assert source.repack_format("model.norm.weight") is None
    assert source.repack_format("model.layers.0.self_attn.k_proj.weight") is None


def test_llama3_rope_factors_become_rope_scaling(tmp_path: Path) -> None:
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = np.array(llama3_factors(scaling, 50000.0, HEAD_DIM), dtype=np.float32)
    # Restated from transformers.modeling_rope_utils: short waves stay, long ones are stretched by the factor.
    assert factors[0] == 1
    assert factors[-1] == 32
    assert np.all(np.diff(factors) >= 0)
    path = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_tensor("rope_freqs.weight", factors))
    source = open_gguf(path, "m")
    assert source.config["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", **scaling}
    assert set(source.tensors) == set(hf_weights("llama"))
    strange = np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "n.gguf", edit=lambda w: w.add_tensor("rope_freqs.weight", strange))
    with pytest.raises(BadInputError, match="follow no known rope scaling"):
        open_gguf(path, "n")


def test_other_rope_scalings(tmp_path: Path) -> None:
    def yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(256)

    config = open_gguf(write_gguf(tmp_path / "q.gguf", "qwen3", edit=yarn), "q").config
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_scaling"]["original_max_position_embeddings"] == 256
    with pytest.raises(BadInputError, match="gemma2 has no yarn rope scaling"):
        open_gguf(write_gguf(tmp_path / "g.gguf", "gemma2", edit=yarn), "g")


def load_tokenizer(source: GGUFSource, folder: Path) -> Any:
    from transformers import AutoTokenizer

    folder.mkdir()
    for name, content in source.sidecars.items():
        assert isinstance(content, bytes)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(dict(source.config)))
    return AutoTokenizer.from_pretrained(folder)


def test_byte_level_tokenizer_loads_and_keeps_control_tokens_whole(tmp_path: Path) -> None:
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "qwen2"), "m")
    tokenizer = load_tokenizer(source, tmp_path / "out")
    text = "<|im_start|>hello world <think>12 naïve, 日本\n\n"
    ids = tokenizer.encode(text)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces[:3] == ["<|im_start|>", "hello", "Ġw"]
    assert "<think>" in pieces
    # Qwen cuts numbers into digits, so the merge of 1 and 2 never happens.
    assert pieces[pieces.index("<think>") + 1 :][:2] == ["1", "2"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<|im_start|>")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhello<|im_end|>\n"


def test_the_pre_tokenizer_named_in_the_file_decides_how_text_is_cut(tmp_path: Path) -> None:
    pieces = {}
    for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2", "deepseek-llm", "tekken"):
        source = open_gguf(write_gguf(tmp_path / f"{pre}.gguf", "llama", pre=pre), pre)
        tokenizer = load_tokenizer(source, tmp_path / pre)
        ids = tokenizer.encode("hello 12 12", add_special_tokens=True)
        pieces[pre] = tokenizer.convert_ids_to_tokens(ids)
        assert tokenizer.decode(ids, skip_special_tokens=True) == "hello 12 12"
    assert pieces["qwen2"] == ["hello", "Ġ", "1", "2", "Ġ", "1", "2"]
    assert pieces["smollm"] == pieces["qwen2"]
    assert pieces["gpt-2"] == ["hello", "Ġ", "12", "Ġ", "12"]
    assert pieces["deepseek-llm"] == pieces["gpt-2"]
    # Llama 3 and Mistral expect a start token even where the file does not say so.
    assert pieces["llama-bpe"] == ["<|im_start|>", *pieces["gpt-2"]]
    assert pieces["tekken"] == ["<|im_start|>", *pieces["qwen2"]]
    with pytest.raises(BadInputError, match="pre-tokenizer 'mystery'"):
        open_gguf(write_gguf(tmp_path / "x.gguf", pre="mystery"), "x")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("pre", [None, "default", ""])
def test_a_file_that_does_not_say_how_text_is_cut_is_not_guessed(
    tmp_path: Path, architecture: str, pre: str | None
) -> None:
    with pytest.raises(BadInputError, match="does not say how its model cuts text") as caught:
        open_gguf(write_gguf(tmp_path / "m.gguf", architecture, pre=pre), "m")
    assert "--pre-tokenizer" in (caught.value.hint or "")


def test_templates_with_names_lie_where_transformers_finds_them(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_array("tokenizer.chat_templates", ["tool_use"])
        writer.add_string("tokenizer.chat_template.tool_use", "{{ tools }}<|im_end|>")

    source = open_gguf(write_gguf(tmp_path / "m.gguf", edit=more), "m")
    tokenizer = load_tokenizer(source, tmp_path / "out")
    assert tokenizer.chat_template == {"default": TEMPLATE, "tool_use": "{{ tools }}<|im_end|>"}
    # With tools, transformers takes it of its own accord.
    asked = [{"role": "user", "content": "hello"}]
    said = tokenizer.apply_chat_template(asked, tools=[{"type": "function"}], tokenize=False)
    assert said == "[{'type': 'function'}]<|im_end|>"


@pytest.mark.parametrize("name", ["../../x", "a/b", "", ".hidden", "x" * 65, "a\nb"])
def test_a_template_of_a_name_that_is_no_word_is_refused(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / "m.gguf", edit=lambda w: w.add_string(f"tokenizer.chat_template.{name}", "x"))
    with pytest.raises(BadInputError, match="a name that is no word"):
        open_gguf(file, "m")


def test_tokens_behind_the_embedding_are_refused_and_rows_without_tokens_are_not(tmp_path: Path) -> None:
    weights = hf_weights("llama")
    tokens = sum(not token.startswith("[PAD") for token in byte_level_vocabulary()[0])
    for rows in (VOCABULARY + 20, VOCABULARY, tokens):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = np.resize(weights[name], (rows, HIDDEN))
        assert open_gguf(write_gguf(tmp_path / "m.gguf", weights=weights), "m").config["vocab_size"] == rows
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][: tokens - 1]
    with pytest.raises(
        BadInputError, match=f"has {tokens} tokens, the last '<think>', and an embedding of {tokens - 1}"
    ):
        open_gguf(write_gguf(tmp_path / "m.gguf", weights=weights), "m")


def sentencepiece_metadata(architecture: str) -> dict[str, Any]:
    """A SentencePiece BPE vocabulary by hand: scores say that ``he`` merges before ``el``."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = ["  ", "▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "▁hell", "▁hello", "el", "▁w"]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + words,
        "tokenizer.ggml.token_type": (*types, 4, *([1] * (len(words) - 1))),
        "tokenizer.ggml.scores": (*([0.0] * 259), *(float(-i) for i in range(len(words)))),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_tokenizer_from_scores() -> None:
    from tokenizers import Tokenizer

    files = tokenizer_files(sentencepiece_metadata("llama"), "llama", "m")
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    encoded = tokenizer.encode("hell w ï")
    assert encoded.tokens == ["<s>", "▁hell", "▁w", "▁", "<0xC3>", "<0xAF>"]
    assert tokenizer.decode(encoded.ids) == "hell w ï"
    # Gemma puts no blank before the text, and knows runs of blanks.
    files = tokenizer_files(sentencepiece_metadata("gemma2"), "gemma2", "m")
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    encoded = tokenizer.encode("hell  w")
    assert encoded.tokens == ["<s>", "hell", "▁▁", "w"]
    assert tokenizer.decode(encoded.ids) == "hell  w"
    assert json.loads(files["tokenizer_config.json"])["add_bos_token"] is True


def test_generation_ends_at_every_token_that_ends_a_turn() -> None:
    metadata = {
        "tokenizer.ggml.tokens": ["<eos>", "<end_of_turn>", "<|im_end|>", "a"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "...<end_of_turn>...",
    }
    assert end_token_ids(metadata) == (0, 1)
    assert end_token_ids(metadata | {"tokenizer.ggml.eot_token_id": 2}) == (0, 2, 1)


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    def refused(pattern: str, architecture: str = "llama", edit: Edit | None = None, **options: Any) -> None:
        path = write_gguf(tmp_path / "m.gguf", architecture, edit=edit, **options)
        with pytest.raises(BadInputError, match=pattern) as caught:
            open_gguf(path, "m")
        assert caught.value.hint
        assert "\n" not in caught.value.message

    refused("architecture 'falcon'", "falcon", weights={})
    refused("no token embedding", weights={})
    refused(
        "'blk.0.attn_sinks.weight'", edit=lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))
    )
    refused("rope.dimension_count is 16", edit=lambda w: w.add_rope_dimension_count(16))
    refused("experts in a layout", edit=lambda w: w.add_expert_count(8))
    refused("padding token id 9999", edit=lambda w: w.add_pad_token_id(9999))
    refused(
        "stores 'blk.0.ffn_up.weight' as Q8_1",
        edit=lambda w: w.add_tensor("blk.0.ffn_up.weight", np.zeros((2, 40), np.uint8), raw_dtype=T.Q8_1),
        weights={},
    )


def test_a_file_cut_anywhere_is_refused_in_one_line(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    sizes = [0, 3, 4, 7, 12, 24, 30, 100, 1000, 5000, 9000, len(whole) // 2, len(whole) - 32]
    for size in sizes:
        cut.write_bytes(whole[:size])
        with pytest.raises(BadInputError, match=r"not a GGUF file|cut short") as caught:
            open_gguf(cut, "cut")
        assert str(cut) in caught.value.message
        assert "\n" not in caught.value.message


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    for content, pattern in (
        (b"not a model at all", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"k" * 64, "cut short"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 62), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(8), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"\xff\xfe", 4) + bytes(8), "UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"w", 1 << 30) + bytes(8), "dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 64, 1 << 20, 0), "not so many"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 33, 2, 0), "no multiple of Q4_0's 32"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 1 << 61, 0, 0), "cut short"),
    ):
        file.write_bytes(content)
        with pytest.raises(BadInputError, match=pattern):
            open_gguf(file, "m")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"tjgg" + struct.pack("<I", 3), "is GGJT, a format before GGUF"),
        (b"lmgg" + bytes(64), "is GGML, a format before GGUF"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "GGUF of version 1,"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "GGUF of version 4, and 2 and 3 are known"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 64, 31, 0),
            "'w' is Q4_0_4_4, a type that llama.cpp",
        ),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 64, 4, 0), "'w' is Q4_2, a type that llama.cpp"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"w", 1, 64, 137, 0), "type 137, which the gguf package"),
    ],
)
def test_what_is_whole_and_not_read_here_says_what_it_is(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        open_gguf(tmp_path / "m.gguf", "m")
    assert said in caught.value.message
    assert "complete" not in caught.value.message
    assert "again" not in (caught.value.hint or "again")


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    tensor = struct.Struct("<Q1sIQIQ").pack
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    entries = tensor(1, b"a", 1, 16, 0, 0) + tensor(1, b"b", 1, 16, 0, 32)
    file.write_bytes(head + entries + bytes(256))
    with pytest.raises(BadInputError, match="'a' and 'b' overlap"):
        open_gguf(file, "m")


def metadata_value(data: st.DataObject) -> tuple[int, bytes]:
    """A value of any type: well-formed, or a count that promises more than there is."""
    kind = data.draw(st.sampled_from([0, 1, 4, 5, 6, 7, 8, 9, 10, 12, 13]))
    if kind == 8:
        text = data.draw(st.binary(max_size=6))
        return kind, struct.pack("<Q", data.draw(st.sampled_from([len(text), 1 << 40, (1 << 64) - 1]))) + text
    if kind == 9:
        inner, count = data.draw(st.integers(0, 13)), data.draw(st.sampled_from([0, 1, 3, 1 << 24, 1 << 40]))
        return kind, struct.pack("<IQ", inner, count) + data.draw(st.binary(max_size=24))
    return kind, data.draw(st.binary(min_size=8, max_size=8))[: {0: 1, 1: 1, 7: 1, 4: 4, 5: 4, 6: 4}.get(kind, 8)]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_metadata_of_any_type_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Known keys with values of the wrong type, and counts that promise too much, never crash or allocate."""
    folder = tmp_path_factory.getbasetemp() / "metadata"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.gguf"
    if not whole.exists():
        write_gguf(whole)
    raw = whole.read_bytes()
    cursor = _Cursor(raw)
    cursor.take(16)
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(cursor.number("Q")):
        name, start = cursor.string(), cursor.at
        cursor.value(cursor.number("I"))
        spans[name] = (start, cursor.at)
    changed = sorted(data.draw(st.sets(st.sampled_from(sorted(spans)), min_size=1, max_size=2)), key=spans.__getitem__)
    for key in reversed(changed):
        kind, value = metadata_value(data)
        start, end = spans[key]
        raw = raw[:start] + struct.pack("<I", kind) + value + raw[end:]
    file = folder / "changed.gguf"
    # Longer metadata moves the weights; there must be enough of them still.
    file.write_bytes(raw + bytes(4096))
    said = ""
    tracemalloc.start()
    try:
        assert "tokenizer.json" in open_gguf(file, "changed").sidecars
    except BadInputError as exc:
        said = exc.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert "\n" not in said
    assert peak < 20_000_000


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_header_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    original = folder / "original.gguf"
    if not original.exists():
        write_gguf(original)
    raw = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 12_000))] = data.draw(st.integers(0, 255))
    file = folder / "flipped.gguf"
    file.write_bytes(raw)
    try:
        source = open_gguf(file, "flipped")
        assert source.tensors
        assert source.sidecars
    except BadInputError:
        return


def test_nearest_formats() -> None:
    found = {kind: str(nearest_format(kind)) for kind in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q2_K", "IQ3_XXS", "IQ1_S")}
    assert found == {
        "Q4_K": "4:64",
        "Q5_K": "5:64",
        "Q6_K": "6:64",
        "Q8_0": "8:32",
        "Q2_K": "2:64",
        "IQ3_XXS": "3:128",
        "IQ1_S": "2:128",
    }
    assert str(nearest_format("MXFP4")) == "mxfp4"
    assert nearest_format("BF16") is None
    for kind in T:
        if kind.name not in ("F64", "I8", "I16", "I32", "I64"):
            nearest_format(kind.name)


def test_recipe_gives_each_module_the_format_of_its_blocks(tmp_path: Path) -> None:
    from mlxq.recipe.match import layer_index, matches, parse_layers

    types = {name: T.Q4_0 for name, weight in hf_weights("llama").items() if weight.ndim > 1}
    types |= {
        "lm_head.weight": T.Q8_0,
        "model.embed_tokens.weight": T.F16,
        "model.layers.1.self_attn.v_proj.weight": T.Q8_0,
        "model.layers.1.mlp.down_proj.weight": T.Q8_0,
        "model.layers.0.self_attn.o_proj.weight": T.Q5_1,
        "model.layers.1.self_attn.o_proj.weight": T.Q5_1,
    }
    source = open_gguf(write_gguf(tmp_path / "m.gguf", types=types), "m")
    recipe = yaml.safe_load(recipe_yaml_from_gguf(source))
    assert recipe["default"] == {"bits": 4, "group_size": 32}
    assert len(recipe["rules"]) == 4

    def decided(path: str) -> Format | None:
        for rule in recipe["rules"]:
            patterns = [rule["match"]] if isinstance(rule["match"], str) else rule["match"]
            layers = parse_layers(rule["layers"], 2) if "layers" in rule else None
            inside = layers is None or layer_index(path) in layers
            if inside and any(matches(pattern, path) for pattern in patterns):
                return None if rule.get("keep") else Format(rule["bits"], rule["group_size"])
        return Format(**recipe["default"])

    for path, kind in source.bit_map().items():
        assert decided(path) == nearest_format(kind), path


def test_layers_of_a_recipe_rule_are_compact(tmp_path: Path) -> None:
    from mlxq.recipe.match import parse_layers

    weights = hf_weights("qwen2", layers=16)
    raised = {0, 1, 2, 5, 8, 11, 15}
    types = {name: T.Q4_0 for name, weight in weights.items() if weight.ndim > 1}
    types |= {f"model.layers.{layer}.mlp.down_proj.weight": T.Q8_0 for layer in raised}
    source = open_gguf(write_gguf(tmp_path / "m.gguf", "qwen2", types=types, weights=weights), "m")
    (rule,) = yaml.safe_load(recipe_yaml_from_gguf(source))["rules"]
    assert rule["match"] == "mlp.down_proj"
    assert parse_layers(rule["layers"], 16) == raised
    assert len(rule["layers"]) <= 3


def test_base_model_comes_from_the_files_own_address(tmp_path: Path) -> None:
    def addressed(writer: gguf.GGUFWriter) -> None:
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, "https://huggingface.co/org/base-1.0")

    assert open_gguf(write_gguf(tmp_path / "m.gguf", edit=addressed), "m").base_model == "org/base-1.0"
    assert open_gguf(write_gguf(tmp_path / "n.gguf"), "n").base_model is None


@pytest.fixture(scope="module")
def sample() -> GGUFSource:
    """The real one, where it is in the cache: nothing is downloaded for a test."""
    if not SAMPLE.is_in(sample_folder() / SAMPLE.file):
        pytest.skip("the sample model is not in the cache; mlxq inspect sample puts it there")
    return told(open_sample(SAMPLE, sample_folder()), lambda _: None)


def test_sample_header(sample: GGUFSource) -> None:
    assert sample.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert sample.kind == "gguf"
    assert sample.weights_folder is None
    assert sum(spec.size for spec in sample.tensors.values()) == 134_515_008
    assert sample.config["rms_norm_eps"] == 1e-5
    assert "match: embed_tokens" in recipe_yaml_from_gguf(sample)


def test_sample_tokenizer_and_chat_template(sample: GGUFSource, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sample, tmp_path / "out")
    text = "Hello, world! 123 naïve"
    # The ids that the model's own tokenizer.json gives.
    assert tokenizer.encode(text) == [19556, 28, 905, 17, 216, 33, 34, 35, 15486, 46494]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_sample_answers_sensibly_from_its_repacked_blocks(sample: GGUFSource, tmp_path: Path) -> None:
    """In float32: MLX's half and quantized products take minutes on a CPU."""
    import mlx.core as mx
    from mlx_lm.generate import generate
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tokenizer_utils import load as load_mlx_tokenizer

    weights = {}
    for name, spec in sample.tensors.items():
        fmt = sample.repack_format(name)
        if fmt:
            weights[name] = mx.array(dequantized_by_mlx(sample.read_repacked(name, 0, spec.rows), fmt))
        else:
            weights[name] = mx.array(read_all(sample, name))
    model = Model(ModelArgs.from_dict(dict(sample.config)))
    model.load_weights(list(weights.items()), strict=True)
    load_tokenizer(sample, tmp_path / "out")
    tokenizer = load_mlx_tokenizer(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in generate(model, tokenizer, prompt, max_tokens=8)


def test_a_file_without_16_bit_tensors_is_written_in_bfloat16(sample: GGUFSource) -> None:
    assert sample.config["torch_dtype"] == "bfloat16"


def test_kept_quantization_holds_the_files_own_values(tmp_path: Path) -> None:
    import mlx.core as mx

    from mlxq.pipeline import Finished, prepare, run
    from mlxq.planning.plan import Stored
    from mlxq.recipe.load import recipe_from_dict

    file = write_gguf(tmp_path / "m.gguf", "llama", types={"model.layers.0.mlp.down_proj.weight": T.Q4_1})
    options = Stored.CARRY_OVER
    plan = prepare(recipe_from_dict({}, "mlx"), resolve(str(file)), options)
    *_, last = run(plan, tmp_path / "out")
    assert isinstance(last, Finished)
    held = mx.load(str(tmp_path / "out" / "model.safetensors"))
    part = {p: held[f"model.layers.0.mlp.down_proj.{p}"] for p in ("weight", "scales", "biases")}
    values = mx.dequantize(
        part["weight"],
        scales=part["scales"].astype(mx.float32),
        biases=part["biases"].astype(mx.float32),
        group_size=32,
        bits=4,
    )
    source = open_gguf(file, "m")
    stored = source.read_rows("model.layers.0.mlp.down_proj.weight", 0, values.shape[0])
    np.testing.assert_array_equal(np.asarray(values), stored)
