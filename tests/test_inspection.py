"""Inspection from headers: folders are written by hand, and hold no data worth reading."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxq.architecture.estimate import Estimate, estimate
from mlxq.architecture.inspection import Inspection, inspect_model
from mlxq.architecture.tokenizer import encode_text
from mlxq.errors import BadInputError
from mlxq.methods.formats import Format
from mlxq.recipe.load import recipe_from_dict
from mlxq.sources.safetensors import open_folder
from mlxq.tensors import DTYPE_BITS, TensorSpec

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "vocab_size": 100,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    """A model folder whose weights are zeros."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = TensorSpec(name, dtype, shape).nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(offset)
    (folder / "model.safetensors").write_bytes(data)
    return folder


def inspect(folder: Path, config: Mapping[str, Any], tensors: Tensors, context: int = 256) -> Inspection:
    return inspect_model(open_folder(write_folder(folder, config, tensors), "m"), context)


def llama_tensors(dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "lm_head.weight": (dtype, (100, 64)),
        "model.embed_tokens.weight": (dtype, (100, 64)),
        "model.norm.weight": (dtype, (64,)),
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        tensors[f"{at}.self_attn.q_proj.weight"] = (dtype, (64, 64))
        tensors[f"{at}.self_attn.q_proj.bias"] = (dtype, (64,))
        tensors[f"{at}.mlp.down_proj.weight"] = (dtype, (64, 128))
        tensors[f"{at}.input_layernorm.weight"] = (dtype, (64,))
    return tensors


def test_a_dense_model(tmp_path: Path) -> None:
    found = inspect(tmp_path, LLAMA, llama_tensors())
    total = 2 * 6400 + 64 + 2 * (4096 + 64 + 8192 + 64)
    assert (found.architecture, found.model_type, found.layer_count) == ("LlamaForCausalLM", "llama", 2)
    assert (found.parameters, found.active_parameters, found.left_behind_parameters) == (total, total, 0)
    assert (found.dtypes, found.stored_bytes) == ({"BF16": 2 * total}, 2 * total)
    assert (found.context_length, found.quantization, found.experts) == (2048, None, None)
    assert (found.tied_embeddings, found.tied_head, found.embedding) == (False, None, "model.embed_tokens")
    assert found.kv_cache_bytes == 2 * 256 * 2 * 2 * 16 * 2
    assert [m.path for m in found.modules][:2] == [
        "model.embed_tokens",
        "model.layers.0.input_layernorm",
    ]
    assert {m.path for m in found.modules if m.quantizable} == {
        "lm_head",
        "model.embed_tokens",
        *(f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "mlp.down_proj")),
    }


def test_layers_come_in_order_of_number(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.down_proj.weight": ("F16", (32, 32)) for i in (10, 2, 0)}
    found = inspect(tmp_path, {**LLAMA, "num_hidden_layers": 11}, tensors)
    assert [m.path.split(".")[2] for m in found.modules] == ["0", "2", "10"]


def test_a_tied_model_that_also_stores_its_head(tmp_path: Path) -> None:
    found = inspect(tmp_path, {**LLAMA, "tie_word_embeddings": True}, llama_tensors())
    assert (found.tied_embeddings, found.tied_head) == (True, "model.embed_tokens")
    assert found.left_behind_parameters == 6400
    assert [m.path for m in found.modules if not m.kept] == ["lm_head"]


def test_a_head_neither_stored_nor_mentioned_is_tied(tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    tensors = {name: spec for name, spec in llama_tensors().items() if name != "lm_head.weight"}
    assert inspect(tmp_path, config, tensors).tied_head == "model.embed_tokens"


def test_expert_lists_are_stacked_and_counted_by_use(tmp_path: Path) -> None:
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    at = "model.layers.0.block_sparse_moe"
    tensors = {f"{at}.experts.{e}.{w}.weight": ("BF16", (32, 64)) for e in range(8) for w in ("w1", "w2", "w3")}
    found = inspect(tmp_path, config, {**tensors, f"{at}.gate.weight": ("BF16", (8, 64))})
    rows = {m.path: m for m in found.modules}
    assert rows.keys() == {f"{at}.gate", *(f"{at}.switch_mlp.{n}_proj" for n in ("gate", "up", "down"))}
    stacked = rows[f"{at}.switch_mlp.down_proj"]
    assert (stacked.shape, stacked.parameters, stacked.expert) == ((8, 32, 64), 8 * 2048, True)
    assert stacked.quantizable
    assert found.parameters == 512 + 3 * 8 * 2048
    assert found.active_parameters == 512 + 3 * 2 * 2048
    assert (found.experts, found.experts_per_token) == (8, 2)


def test_fused_experts_and_shared_ones(tmp_path: Path) -> None:
    config = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 1}
    tensors: Tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", (4, 64, 32)),
        "model.layers.0.mlp.shared_expert.up_proj.weight": ("BF16", (32, 64)),
    }
    found = inspect(tmp_path, config, tensors)
    assert [m.expert for m in found.modules] == [True, False]
    assert found.active_parameters == 2048 + 2048


def test_a_router_with_its_own_correction_is_no_linear_layer(tmp_path: Path) -> None:
    tensors: Tensors = {
        "model.layers.0.mlp.gate.weight": ("BF16", (8, 64)),
        "model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (8,)),
    }
    assert not any(m.quantizable for m in inspect(tmp_path, LLAMA, tensors).modules)


def test_towers_and_extra_prediction_layers_are_left_behind(tmp_path: Path) -> None:
    tensors: Tensors = {
        "model.layers.1.mlp.up_proj.weight": ("BF16", (32, 32)),
        "model.layers.2.eh_proj.weight": ("BF16", (32, 32)),
        "vision_tower.blocks.0.fc.weight": ("BF16", (32, 32)),
        "mtp.fc.weight": ("BF16", (32, 32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (8,)),
    }
    found = inspect(tmp_path, LLAMA, tensors)
    assert [m.path for m in found.modules if m.kept] == ["model.layers.1.mlp.up_proj"]
    assert (found.parameters, found.left_behind_parameters) == (1024, 3 * 1024 + 8)


def test_mlx_quantization_shows_logical_shapes_and_bits(tmp_path: Path) -> None:
    quantization = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.b": {"group_size": 32, "bits": 6, "mode": "affine"},
        "model.layers.0.c": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.layers.0.d": False,
    }
    tensors: Tensors = {
        "model.layers.0.a.weight": ("U32", (8, 16)),
        "model.layers.0.a.scales": ("BF16", (8, 2)),
        "model.layers.0.a.biases": ("BF16", (8, 2)),
        "model.layers.0.b.weight": ("U32", (8, 24)),
        "model.layers.0.b.scales": ("BF16", (8, 4)),
        "model.layers.0.b.biases": ("BF16", (8, 4)),
        "model.layers.0.c.weight": ("U32", (8, 16)),
        "model.layers.0.c.scales": ("U8", (8, 4)),
        "model.layers.0.d.weight": ("BF16", (8, 128)),
    }
    found = inspect(tmp_path, {**LLAMA, "quantization": quantization}, tensors)
    assert [m.shape for m in found.modules] == [(8, 128)] * 4
    assert [m.format for m in found.modules] == [
        Format(4, 64),
        Format(6, 32),
        Format(4, 32, "mxfp4"),
        None,
    ]
    assert found.quantization is not None
    assert (found.quantization.method, found.parameters) == ("mlx", 4 * 1024)
    assert found.quantization.detail == "affine, 4 bits, group size 64; 2 modules differ"


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 64},
            {"qweight": ("I32", (128, 8)), "qzeros": ("I32", (2, 8)), "scales": ("F16", (2, 64))},
        ),
        (
            {"quant_method": "gptq", "bits": 4},
            {"qweight": ("I32", (16, 64)), "scales": ("F16", (2, 64)), "g_idx": ("I32", (128,))},
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            {"weight": ("F8_E4M3", (64, 128)), "weight_scale_inv": ("F32", (1, 1))},
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}},
            {
                "weight_packed": ("I32", (64, 16)),
                "weight_scale": ("BF16", (64, 4)),
                "weight_shape": ("I64", (2,)),
            },
        ),
    ],
)
def test_other_quantizations_show_logical_shapes(tmp_path: Path, settings: dict[str, Any], tensors: Tensors) -> None:
    named = {f"model.layers.0.mlp.up_proj.{part}": spec for part, spec in tensors.items()}
    found = inspect(tmp_path, {**LLAMA, "quantization_config": settings}, named)
    (module,) = found.modules
    assert (module.path, module.shape, module.quantizable) == ("model.layers.0.mlp.up_proj", (64, 128), True)
    assert found.parameters == 64 * 128
    assert found.quantization is not None
    assert found.quantization.method == settings["quant_method"]


def test_mxfp4_blocks(tmp_path: Path) -> None:
    tensors: Tensors = {
        "model.layers.0.mlp.experts.down_proj_blocks": ("U8", (4, 64, 2, 16)),
        "model.layers.0.mlp.experts.down_proj_scales": ("U8", (4, 64, 2)),
        "model.layers.0.mlp.experts.down_proj_bias": ("BF16", (4, 64)),
    }
    found = inspect(tmp_path, {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}, tensors)
    rows = {m.path.rpartition(".")[2]: m for m in found.modules}
    assert rows.keys() == {"down_proj", "down_proj_bias"}
    assert rows["down_proj"].shape == (4, 64, 64)
    assert [rows[name].quantizable for name in ("down_proj", "down_proj_bias")] == [True, False]


WORDS = {"[UNK]": 0, "hello": 1, "world": 2}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of two words, with one special token behind them."""
    special = {"id": 3, "content": "<s>", "special": True, "single_word": False}
    special |= {"lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
        "truncation": None,
        "padding": None,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_tokenizer_facts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA, llama_tensors())
    bare = inspect_model(open_folder(folder, "m"), 1).tokenizer
    assert (bare.kind, bare.vocabulary, bare.counted, bare.chat_template) == (None, 100, False, False)
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "X"}))
    found = inspect_model(open_folder(folder, "m"), 1).tokenizer
    assert (found.kind, found.vocabulary, found.chat_template) == ("WordLevel", 4, False)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert inspect_model(open_folder(folder, "m"), 1).tokenizer.chat_template


def test_a_template_inside_the_tokenizer_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA, llama_tensors())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert inspect_model(open_folder(folder, "m"), 1).tokenizer.chat_template


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA, llama_tensors())
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match=r"tokenizer\.json:1: not valid JSON"):
        inspect_model(open_folder(folder, "m"), 1)


def test_encoding_and_back(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA, llama_tensors())
    write_tokenizer(folder)
    source = open_folder(folder, "m")
    found = encode_text(source, "hello world")
    assert (found.ids, found.pieces) == ((3, 1, 2), ("<s>", "hello", "world"))
    assert (found.decoded, found.round_trips) == ("hello world", True)
    assert not encode_text(source, "hello moon").round_trips


def test_encoding_without_a_tokenizer(tmp_path: Path) -> None:
    source = open_folder(write_folder(tmp_path, LLAMA, llama_tensors()), "m")
    with pytest.raises(BadInputError, match="tokenizer is missing"):
        encode_text(source, "hello")


def test_inspecting_imports_nothing_heavy(tmp_path: Path) -> None:
    write_folder(tmp_path, LLAMA, llama_tensors())
    code = (
        "import sys\n"
        "import mlxq.architecture.estimate, mlxq.architecture.inspection, mlxq.machine.devices\n"
        "from pathlib import Path\n"
        "from mlxq.sources.safetensors import open_folder\n"
        f"mlxq.architecture.inspection.inspect_model(open_folder(Path({str(tmp_path)!r}), 'm'), 4096)\n"
        "mlxq.machine.devices.find_device('m4-max-64gb')\n"
        "heavy = ('mlx', 'mlx_lm', 'transformers', 'tokenizers', 'numpy', 'huggingface_hub')\n"
        "print(sorted(set(heavy) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mixture_of_many_tensors_is_quick(tmp_path: Path) -> None:
    import time

    config = {**LLAMA, "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8}
    tensors = {
        f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight": ("BF16", (1, 32))
        for layer in range(48)
        for e in range(128)
        for name in ("gate", "up", "down")
    }
    source = open_folder(write_folder(tmp_path, config, tensors), "m")
    before = time.process_time()
    found = inspect_model(source, 4096)
    assert time.process_time() - before < 2
    assert len(found.modules) == 48 * 3
    assert found.stored_bytes == len(tensors) * 32 * DTYPE_BITS["BF16"] // 8


def estimate_with(found: Inspection, recipe: dict[str, Any]) -> Estimate:
    return estimate(found, recipe_from_dict(recipe, "test"))


def test_estimates_count_every_byte(tmp_path: Path) -> None:
    found = inspect(tmp_path, LLAMA, llama_tensors())
    recipe = {
        "default": {"bits": 4, "group_size": 64},
        "rules": [{"match": "lm_head", "bits": 8}, {"match": "q_proj", "keep": True}],
    }
    embedding, head = 6400 * (4 + 0.5) / 8, 6400 * (8 + 0.5) / 8
    layers = 2 * (2 * 4096 + 8192 * 4.5 / 8 + 2 * 64 + 2 * 64)
    guess = estimate_with(found, recipe)
    assert guess.weight_bytes == embedding + head + layers + 2 * 64
    assert guess.read_bytes == guess.weight_bytes - embedding


def test_estimates_equal_the_plan(tmp_path: Path) -> None:
    from mlxq.architecture.bind import bind
    from mlxq.planning.make import make_plan

    tensors = llama_tensors()
    for layer in range(2):
        at = f"model.layers.{layer}"
        del tensors[f"{at}.self_attn.q_proj.bias"]
        tensors[f"{at}.self_attn.k_proj.weight"] = ("BF16", (32, 64))
        tensors[f"{at}.self_attn.v_proj.weight"] = ("BF16", (32, 64))
        tensors[f"{at}.self_attn.o_proj.weight"] = ("BF16", (64, 64))
        tensors[f"{at}.mlp.gate_proj.weight"] = ("BF16", (128, 64))
        tensors[f"{at}.mlp.up_proj.weight"] = ("BF16", (128, 64))
        tensors[f"{at}.post_attention_layernorm.weight"] = ("BF16", (64,))
    config = {**LLAMA, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    source = open_folder(write_folder(tmp_path, config, tensors), "m")
    for settings in (
        {"default": {"bits": 3, "group_size": 32}},
        {"default": {"mode": "mxfp4"}},
        {"dtype": "float32"},
    ):
        recipe = recipe_from_dict(settings, "test")
        plan = make_plan(source, recipe, bind(source))
        assert estimate(inspect_model(source, 1), recipe).weight_bytes == plan.weight_bytes


def test_estimates_of_tied_heads_experts_and_odd_widths(tmp_path: Path) -> None:
    config = {**LLAMA, "tie_word_embeddings": True, "num_experts": 4, "num_experts_per_tok": 1}
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", (100, 64)),
        "model.layers.0.mlp.experts.gate_up_proj": ("BF16", (4, 64, 32)),
        "model.layers.0.mlp.odd.weight": ("BF16", (10, 30)),
        "vision_tower.fc.weight": ("BF16", (64, 64)),
    }
    found = inspect(tmp_path, config, tensors)
    guess = estimate_with(found, {"default": {"bits": 4}, "rules": [{"match": "lm_head", "bits": 8}]})
    head, experts, odd = 6400 * 8.5 / 8, 4 * 64 * 32 * 5 / 8, 300 * 2
    assert guess.weight_bytes == head + experts + odd
    assert guess.read_bytes == head + experts / 4 + odd


def test_an_unquantized_estimate_of_a_quantized_model(tmp_path: Path) -> None:
    tensors: Tensors = {
        "model.layers.0.a.weight": ("U32", (8, 16)),
        "model.layers.0.a.scales": ("BF16", (8, 2)),
        "model.layers.0.a.biases": ("BF16", (8, 2)),
    }
    found = inspect(tmp_path, {**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, tensors)
    assert estimate_with(found, {}).weight_bytes == 8 * 128 * 2
    assert estimate_with(found, {"default": {"bits": 2}}).weight_bytes == 8 * 128 * 2.5 / 8
