"""Which module is the head, and which choose among experts: asked of real models, each a trap for a guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxq.architecture.bind import bind
from mlxq.architecture.roles import routers, tied_head
from mlxq.sources.safetensors import open_folder
from tests.checkpoints import LLAMA, build, llama, save

GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    # Four layers of 24: the projection of the per-layer embedding has as many rows as the vocabulary.
    "hidden_size_per_layer_input": 24,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "use_double_wide_mlp": False,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
}


def model_of(config: dict[str, Any]) -> nn.Module:
    return build(config)[0]


@pytest.mark.parametrize("stated", [{"tie_word_embeddings": True}, {}])
def test_a_second_embedding_and_a_projection_of_as_many_rows_do_not_hide_the_tied_head(stated: dict[str, Any]) -> None:
    model = model_of({**GEMMA4, **stated})
    assert model.model.embed_tokens_per_layer.weight.shape[0] == 96
    assert model.model.per_layer_model_projection.weight.shape[0] == 96
    assert tied_head(model, {**GEMMA4, **stated}) == "model.embed_tokens"


@pytest.mark.parametrize(("tied", "head"), [(True, "model.embed_tokens"), (False, None)])
def test_the_model_knows_whether_it_has_a_head_of_its_own(tied: bool, head: str | None) -> None:
    config = {**LLAMA, "tie_word_embeddings": tied}
    assert tied_head(model_of(config), config) == head


def test_the_default_of_the_model_counts_where_the_config_is_silent() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    assert tied_head(model_of(config), config) == "model.embed_tokens"


def test_layers_as_wide_as_the_vocabulary_are_no_head() -> None:
    config = {**LLAMA, "tie_word_embeddings": True, "intermediate_size": 96, "vocab_size": 96}
    assert tied_head(model_of(config), config) == "model.embed_tokens"


class Handmade(nn.Module):  # type: ignore[misc]
    """A model that multiplies by its embedding's weight itself, so that no call tells, or cannot run here at all."""

    def __init__(self, *, runs: bool, head: bool) -> None:
        super().__init__()
        self.position_table = nn.Embedding(96, 8)
        self.embed_tokens = nn.Embedding(96, 8)
        self.layers = [nn.Linear(8, 8)]
        if head:
            self.lm_head = nn.Linear(8, 96, bias=False)
        self.runs = runs

    def __call__(self, ids: mx.array) -> mx.array:
        if not self.runs:
            raise RuntimeError("needs Metal")
        logits: mx.array = self.layers[0](self.embed_tokens(ids)) @ self.embed_tokens.weight.T
        return logits


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize(
    ("config", "own_head", "expected"),
    [
        ({"tie_word_embeddings": True}, False, "embed_tokens"),
        ({"text_config": {"tie_word_embeddings": True}}, False, "embed_tokens"),
        ({}, False, "embed_tokens"),
        ({"tie_word_embeddings": False}, True, None),
        ({}, True, None),
    ],
)
def test_where_no_call_tells_the_config_does(
    runs: bool, config: dict[str, Any], own_head: bool, expected: str | None
) -> None:
    assert tied_head(Handmade(runs=runs, head=own_head), config) == expected


def test_looking_leaves_the_model_as_it_was() -> None:
    model = model_of(LLAMA)
    before = {path: type(leaf) for path, leaf in model.named_modules()}
    tied_head(model, LLAMA)
    assert {path: type(leaf) for path, leaf in model.named_modules()} == before


def test_binding_names_the_head(tmp_path: Path) -> None:
    assert bind(open_folder(llama(tmp_path / "own"), "m")).tied_head is None
    tied = llama(tmp_path / "tied", tie_word_embeddings=True)
    assert bind(open_folder(tied, "m")).tied_head == "model.embed_tokens"


@dataclass(frozen=True)
class Shape:
    path: str
    shape: tuple[int, ...]
    quantizable: bool = True


STACK = Shape("layers.0.mlp.switch_mlp.up_proj", (8, 32, 16))
BESIDE = Shape("layers.0.experts.switch_glu.up_proj", (8, 32, 16))


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ([STACK, Shape("layers.0.mlp.gate", (8, 16))], {"layers.0.mlp.gate"}),
        # In a module of its own, beside the experts or beside what holds them.
        ([STACK, Shape("layers.0.mlp.router.layer", (8, 16))], {"layers.0.mlp.router.layer"}),
        ([BESIDE, Shape("layers.0.router.proj", (8, 16))], {"layers.0.router.proj"}),
        # Attention with as many rows as there are experts chooses nothing.
        ([STACK, Shape("layers.0.self_attn.k_proj", (8, 16)), Shape("layers.0.self_attn.o_proj", (16, 16))], set()),
        (
            [STACK, Shape("layers.0.mlp.dense.up_proj", (8, 16)), Shape("layers.0.mlp.dense.down_proj", (16, 8))],
            set(),
        ),
        # Another layer's stack, another number of rows, and no stack at all.
        ([STACK, Shape("layers.1.mlp.gate", (8, 16))], set()),
        ([STACK, Shape("layers.0.mlp.gate", (4, 16))], set()),
        ([Shape("layers.0.conv", (8, 3, 1), quantizable=False), Shape("layers.0.gate", (8, 16))], set()),
    ],
)
def test_routers_have_an_output_for_each_expert_of_a_stack_near_them(modules: list[Shape], found: set[str]) -> None:
    assert routers(modules) == found


MIXTURE = {
    **GEMMA4,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "tie_word_embeddings": True,
}


def test_the_routers_of_a_mixture_that_keeps_them_apart(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", MIXTURE, build(MIXTURE)[1])
    architecture = bind(open_folder(folder, "m"))
    assert routers(architecture.modules) == {f"model.layers.{layer}.router.proj" for layer in range(4)}
