"""Tiny real models for tests: built by ``mlx_lm``'s own model classes, saved as Hugging Face checkpoints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

VOCABULARY = 96


def make_tokenizer(folder: Path) -> None:
    """A byte-free word tokenizer with a chat template, enough for ``mlx_lm`` to load and generate."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *[chr(c) for c in range(33, 33 + VOCABULARY - 3)]]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def add_start_token(folder: Path) -> None:
    """Make the tokenizer put ``<s>`` (id 1) in front of a text, as that of Llama 3 or Gemma does."""
    content = json.loads((folder / "tokenizer.json").read_text())
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def build(config: dict[str, Any], seed: int = 0) -> tuple[Any, dict[str, mx.array]]:
    """The model for ``config`` with random weights, and its parameters by MLX path."""
    import mlx_lm.utils

    model_class, args_class = mlx_lm.utils._get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    dtype = getattr(mx, config.get("torch_dtype", "float32"))
    model.update(
        tree_map(
            lambda p: (mx.random.normal(p.shape) * 0.1).astype(dtype) if mx.issubdtype(p.dtype, mx.floating) else p,
            model.parameters(),
        )
    )
    weights = dict(tree_flatten(model.parameters()))
    mx.eval(weights)
    return model, weights


def save(folder: Path, config: dict[str, Any], weights: dict[str, mx.array], shards: int = 1) -> Path:
    """Write ``weights`` as a checkpoint of ``shards`` files with config and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    weight_map = {}
    for index in range(shards):
        part = {name: weights[name] for name in names[index::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    make_tokenizer(folder)
    return folder


def llama(folder: Path, shards: int = 1, **changes: Any) -> Path:
    """A two-layer Llama checkpoint; ``changes`` go into its config."""
    config = {**LLAMA, **changes}
    _, weights = build(config)
    return save(folder, config, weights, shards)


def module_of(model_type: str) -> Any:
    """The ``mlx_lm`` module of a model type."""
    return importlib.import_module(f"mlx_lm.models.{model_type}")
