"""What is in a model, from its headers and small files alone; needs neither MLX nor numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mlxq.architecture.config import (
    active_share,
    context_length,
    experts,
    experts_per_token,
    layer_count,
    text_config,
    ties_head,
)
from mlxq.architecture.kv_cache import kv_cache_bytes
from mlxq.architecture.packed import HELPERS, logical
from mlxq.architecture.tokenizer import TokenizerFacts, tokenizer_facts
from mlxq.families import EMBEDDINGS, EXPERT_STACKS, HEADS, MIXTRAL, SINGLE_EXPERT, part_of
from mlxq.methods.formats import Format
from mlxq.recipe.match import layer_index
from mlxq.sources.quantization import Quantization
from mlxq.tensors import DTYPE_BITS, FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource


@dataclass(frozen=True)
class InspectedModule:
    """A module's weight, or a parameter that belongs to none.

    ``path`` is the MLX module path as far as names tell (experts stacked as ``switch_mlp``), or a parameter's
    own name where it is no weight. ``shape`` is logical: of numbers, not of packed words. ``dtype`` is the
    stored one in safetensors spelling; ``format`` the MLX format it is already in; ``stored_as`` says either of
    them, or the GGML type of a GGUF file, for people; ``stored_bits`` per number, without scales. ``quantizable``
    is a guess from name and shape, ``castable`` whether it holds floats; ``expert`` marks routed experts, ``kept``
    is False for what ``mlx_lm`` leaves behind (vision towers, MTP heads, tied copies).
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    format: Format | None
    stored_as: str
    stored_bits: int
    parameters: int
    quantizable: bool
    castable: bool
    expert: bool
    kept: bool


@dataclass(frozen=True)
class Inspection:
    """Everything the headers tell. Parameter counts are of the language model, as MLX runs it.

    ``dtypes`` maps stored dtypes (GGML types of a GGUF file) to bytes. ``embedding`` is the path of the token
    embedding, ``tied_head`` the same where it also serves as the head. ``kv_cache_bytes`` is for ``context`` tokens.
    """

    name: str
    kind: str
    architecture: str
    model_type: str
    parameters: int
    active_parameters: int
    left_behind_parameters: int
    stored_bytes: int
    dtypes: Mapping[str, int]
    quantization: Quantization | None
    context_length: int | None
    layer_count: int
    experts: int | None
    experts_per_token: int | None
    tied_embeddings: bool
    embedding: str | None
    tied_head: str | None
    tokenizer: TokenizerFacts
    modules: tuple[InspectedModule, ...]
    context: int
    kv_cache_bytes: int
    config: Mapping[str, Any]


def inspect_model(source: ModelSource, context: int) -> Inspection:
    """Read what headers, config and tokenizer files say of a model; ``context`` in tokens, for the KV cache.

    Raises BadInputError where a tokenizer file is not JSON.
    """
    config = source.config
    modules = _modules(source)
    layers = layer_count(config) or 1 + max((layer_index(m.path) or 0 for m in modules), default=-1)
    tied = ties_head(config, has_head=any(_name(module) in HEADS for module in modules))
    modules = tuple(_left_behind(module, layers, tied=tied) for module in modules)
    kept = [module for module in modules if module.kept]
    embedding = next((m.path for m in kept if _name(m) in EMBEDDINGS and len(m.shape) == 2), None)
    total = sum(module.parameters for module in kept)
    routed = sum(module.parameters for module in kept if module.expert)
    dtypes: Counter[str] = Counter()
    for stored, nbytes in source.stored_types.values():
        dtypes[stored] += nbytes
    model_type = str(config.get("model_type", "unknown"))
    return Inspection(
        name=source.name,
        kind=source.kind,
        architecture=str(next(iter(config.get("architectures") or ()), model_type)),
        model_type=model_type,
        parameters=total,
        active_parameters=total - routed + round(routed * active_share(config)),
        left_behind_parameters=sum(module.parameters for module in modules) - total,
        stored_bytes=source.stored_bytes,
        dtypes=dict(dtypes.most_common()),
        quantization=source.quantization,
        context_length=context_length(config),
        layer_count=layers,
        experts=experts(config) if routed else None,
        experts_per_token=experts_per_token(config) if routed else None,
        tied_embeddings=tied,
        embedding=embedding,
        tied_head=embedding if tied else None,
        tokenizer=tokenizer_facts(source.sidecars, text_config(config)),
        modules=modules,
        context=context,
        kv_cache_bytes=kv_cache_bytes(config, context),
        config=config,
    )


def _name(module: InspectedModule) -> str:
    """The last component of a module's path."""
    return module.path.rpartition(".")[2]


def _modules(source: ModelSource) -> tuple[InspectedModule, ...]:
    """Modules in reading order: embedding, layers by number, the rest."""
    stored = {name: kind for name, (kind, _) in source.stored_types.items()}
    parts: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in source.tensors.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = spec
    found = [row for module, specs in parts.items() for row in _rows(module, specs, source.config, stored)]
    return tuple(sorted(_stacked(found), key=_reading_order))


def _reading_order(module: InspectedModule) -> tuple[int, list[tuple[int, str]]]:
    rank = 1 if layer_index(module.path) is not None else 0 if "emb" in module.path or "wte" in module.path else 2
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in module.path.split(".")]


def _rows(
    module: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], stored: Mapping[str, str]
) -> Iterable[InspectedModule]:
    """The weight of one checkpoint module, and its other parameters."""
    # bitsandbytes hangs its helpers under the weight's own name.
    if module.endswith(".weight") and not specs.keys() - HELPERS - {
        "bitsandbytes__nf4",
        "bitsandbytes__fp4",
    }:
        return
    quantized = {"weight", "qweight", "weight_packed"} & specs.keys() and HELPERS & specs.keys()
    router = "e_score_correction_bias" in specs
    for part, spec in specs.items():
        if (quantized and part in HELPERS) or "bitsandbytes__" in part or part.endswith("_scales"):
            continue
        weight = part in ("weight", "qweight", "weight_packed")
        path = module if weight and module else ".".join(filter(None, (module, part.removesuffix("_blocks"))))
        shape, bits, fmt = logical(path, part, spec, specs, config)
        last = path.rpartition(".")[2]
        expert = not EXPERT_STACKS.isdisjoint(path.split(".")[:-1])
        floats = spec.dtype in FLOAT_DTYPES or spec.dtype.startswith("F8") or bits != DTYPE_BITS[spec.dtype]
        yield InspectedModule(
            path=path,
            shape=shape,
            dtype=spec.dtype,
            format=fmt,
            stored_as=_stored_text(fmt, bits, spec, stored[spec.name]),
            stored_bits=bits,
            parameters=math.prod(shape),
            quantizable=floats
            and not router
            and "norm" not in last
            and "conv" not in last
            and "bias" not in last
            and ((weight and len(shape) >= 2) or (expert and len(shape) == 3)),
            castable=floats,
            expert=expert,
            kept=True,
        )


def _stored_text(fmt: Format | None, bits: int, spec: TensorSpec, kind: str) -> str:
    if fmt is None and bits != DTYPE_BITS[spec.dtype]:
        return f"{bits} bits in {kind.lower()}"
    return str(fmt or kind.lower())


def _stacked(rows: Iterable[InspectedModule]) -> Iterable[InspectedModule]:
    """Rows with ``experts.{i}.`` lists as one row each, under the path and shape ``mlx_lm`` stacks them
    to.
    """
    groups: dict[tuple[str, tuple[int, ...], str, Format | None], list[InspectedModule]] = {}
    for row in rows:
        if found := SINGLE_EXPERT.fullmatch(row.path):
            head, _, tail = found.groups()
            tail = ".".join(MIXTRAL.get(part, part) for part in tail.split("."))
            groups.setdefault((f"{head}.switch_mlp.{tail}", row.shape, row.dtype, row.format), []).append(row)
        else:
            yield row
    for (path, shape, _, _), members in groups.items():
        count = len(members)
        first = members[0]
        yield replace(first, path=path, shape=(count, *shape), parameters=first.parameters * count, expert=True)


def _left_behind(module: InspectedModule, layers: int, *, tied: bool) -> InspectedModule:
    """``kept`` as ``mlx_lm``'s sanitize would have it."""
    index = layer_index(module.path)
    extra_layer = index is not None and index >= layers and ".layers." in f".{module.path}"
    copy = tied and _name(module) in HEADS
    return replace(module, kept=not (copy or extra_layer or part_of(module.path)))
