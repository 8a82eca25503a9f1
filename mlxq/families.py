"""What is known of model families beyond what their configs and modules show, in one table.

A family is a row, by the ``model_type`` of the model or of its language part. A model that has no row works by its
config and its modules alone: a row is for what neither says. It stands on the ground, because sources read it too: a
GGUF file has no ``config.json``, and what llama.cpp leaves out of its metadata is a fact of the family.

The names of parts (towers, prediction heads, buffers) are shared by all families: no two of them mean different
things by one name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts of one family, as ``mlx_lm`` 0.32 runs it.

    ``rotating``: layers with a window are kept in a cache of the window's size; elsewhere every token is kept,
    whatever the config says of windows. ``chunked``: that cache is cut to the window, and grows by a step before it
    is cut again. ``window_keys``: what the config calls the window. ``global_every``: one
    layer in so many attends to everything, where the config does not say. ``windowed_attention``: every attention
    has the window, though the config calls it plain. ``all_state``: no layer attends, each keeps a constant state.
    ``state_beside_attention``: every layer keeps a state, those that attend too. ``expanded_latent``: the latent of
    its attention is expanded to full heads before it is cached. ``attentions_per_layer``: caches of one layer.
    ``own_head``: a head of its own can exist; otherwise the token embedding always serves as the head.
    """

    rotating: bool = False
    chunked: bool = False
    window_keys: tuple[str, ...] = (
        "sliding_window",
        "sliding_window_size",
        "attention_window_size",
        "window_size",
    )
    global_every: int | None = None
    windowed_attention: bool = False
    all_state: bool = False
    state_beside_attention: bool = False
    expanded_latent: bool = False
    attentions_per_layer: int = 1
    own_head: bool = True


_GEMMA3 = Family(rotating=True, global_every=6)
_ROTATING = Family(rotating=True)
_STATE = Family(all_state=True)
_TWO_ATTENTIONS = Family(attentions_per_layer=2)

FAMILIES: Mapping[str, Family] = {
    "afmoe": _ROTATING,
    "cohere": Family(own_head=False),
    "cohere2": Family(rotating=True, global_every=4, own_head=False),
    "deepseek_v2": Family(expanded_latent=True),
    "exaone4": _ROTATING,
    "exaone_moe": _ROTATING,
    "falcon_h1": Family(state_beside_attention=True),
    "falcon_mamba": _STATE,
    "gear": _ROTATING,
    "gemma": Family(own_head=False),
    "gemma2": Family(own_head=False),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n": Family(rotating=True, own_head=False),
    "gemma3n_text": Family(rotating=True, own_head=False),
    "gemma4": _ROTATING,
    "gemma4_text": _ROTATING,
    "gpt_oss": Family(rotating=True, global_every=2),
    "laguna": _ROTATING,
    "llama": _ROTATING,
    "llama4": Family(rotating=True, chunked=True, window_keys=("attention_chunk_size",), global_every=4),
    "longcat_flash": _TWO_ATTENTIONS,
    "longcat_flash_ngram": _TWO_ATTENTIONS,
    "mamba": _STATE,
    "mamba2": _STATE,
    "mellum": _ROTATING,
    "mimo_v2_flash": _ROTATING,
    "minicpm3": Family(expanded_latent=True),
    "ministral3": _ROTATING,
    "mistral": _ROTATING,
    "mistral3": _ROTATING,
    "muse_glimmer": _ROTATING,
    "muse_spark": _ROTATING,
    "olmo3": Family(rotating=True, global_every=4),
    "plamo3": _ROTATING,
    "recurrent_gemma": Family(rotating=True, windowed_attention=True),
    "rwkv7": _STATE,
    "spark2_5": _ROTATING,
    "step3p5": _ROTATING,
}


def family_named(model_type: str) -> Family:
    """The row of a model type, or that of a model of which nothing is known."""
    return FAMILIES.get(model_type, Family())


@dataclass(frozen=True)
class Part:
    """Something a checkpoint can hold beside its language model. ``label`` is for people.

    A tensor is of it where a component of its name is all of ``component``. ``ability``: leaving it out takes
    something away that the model could do.
    """

    label: str
    component: re.Pattern[str]
    ability: bool = False

    def holds(self, name: str) -> bool:
        """Whether the tensor or module called ``name`` is of this part."""
        return any(self.component.fullmatch(component) for component in name.split("."))


PREDICTION_HEAD = Part("prediction head", re.compile(r"mtp(_\w+)?"))
PARTS = (
    Part(
        "vision tower",
        re.compile(r"vision|vision_tower|vision_model|vision_encoder|vision_embed_tokens|visual|vit"),
        ability=True,
    ),
    Part(
        "image projector",
        re.compile(r"(multi_modal|mm)_projector|vision_language_adapter|embed_vision|aligner|patch_merge_mlp"),
        ability=True,
    ),
    Part("audio tower", re.compile(r"audio_tower|embed_audio"), ability=True),
    PREDICTION_HEAD,
    Part("buffers, which are computed anew", re.compile(r"inv_freq|masked_bias")),
)

# What checkpoints call the token embedding, and a head of its own.
EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embeddings", "embedding", "embed_in"}
)
HEADS = frozenset({"lm_head", "embed_out"})
# Mixtral's names for the three matrices of an expert, and mlx_lm's.
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# Path components below which the experts of a stack lie.
EXPERT_STACKS = frozenset({"experts", "switch_mlp"})
# One of several experts that are stored one by one: what comes before, its number, what comes after.
SINGLE_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(.+)")


def part_of(name: str) -> Part | None:
    """The part beside the language model that a tensor or module is of, as far as its name tells."""
    return next((part for part in PARTS if part.holds(name)), None)
