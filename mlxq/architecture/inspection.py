"""What is in a model, from its headers and small files alone; needs neither MLX nor numpy."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.machine.memory import (
    active_share,
    experts,
    experts_per_token,
    first_int,
    kv_cache_bytes,
    layer_count,
    text_config,
)
from mlxq.methods.formats import HELPER_PARTS, TERNARY_PER_BYTE, TERNARY_SCALE, Format
from mlxq.recipe.match import layer_index
from mlxq.sources.safetensors import read_json
from mlxq.tensors import DTYPE_BITS, FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource

# Parts that describe how another tensor of the module is quantized, and hold no parameters of their own.
_HELPERS = frozenset(
    [
        *HELPER_PARTS,
        "qzeros",
        "g_idx",
        "weight_scale",
        "weight_scale_inv",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "input_scale",
        "input_global_scale",
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
    ]
)
# What mlx_lm leaves behind: towers of other modes, heads for multi-token prediction, buffers.
_LEFT_BEHIND = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|vision_embed_tokens|vit|multi_modal_projector|vision_language_adapter|"
    r"audio_tower|embed_vision|embed_audio|mtp|mtp_layers)(\.|$)|rotary_emb\.inv_freq$|\.masked_bias$"
)
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(.+)")
_EMBEDDINGS = {
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embeddings",
    "embedding",
    "embed_in",
}
# Mixtral's names for the three matrices of an expert, and mlx_lm's.
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


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
class Quantization:
    """How the source is quantized already: ``method`` (``mlx``, ``gguf``, ``fp8``, ``awq``, ...) and its
    details.
    """

    method: str
    detail: str


@dataclass(frozen=True)
class TokenizerFacts:
    """What the small files say of the tokenizer; None where they do not say.

    ``counted`` says that the vocabulary was counted in the tokenizer itself; else it is the config's, which may have
    rows to spare.
    """

    kind: str | None
    vocabulary: int | None
    counted: bool
    chat_template: bool


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


@dataclass(frozen=True)
class Encoding:
    """A text as token ids and pieces, and whether its own tokens decode to it again."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    decoded: str
    round_trips: bool


def inspect_model(source: ModelSource, context: int) -> Inspection:
    """Read what headers, config and tokenizer files say of a model; ``context`` in tokens, for the KV cache.

    Raises BadInputError where a tokenizer file is not JSON.
    """
    config = source.config
    inner = text_config(config)
    modules = _modules(source)
    layers = layer_count(config) or 1 + max((layer_index(m.path) or 0 for m in modules), default=-1)
    head = any(module.path.rpartition(".")[2] in ("lm_head", "embed_out") for module in modules)
    tied = bool(inner.get("tie_word_embeddings", not head))
    modules = tuple(_left_behind(module, layers, tied=tied) for module in modules)
    kept = [module for module in modules if module.kept]
    embedding = next((m.path for m in kept if m.path.rpartition(".")[2] in _EMBEDDINGS and len(m.shape) == 2), None)
    total = sum(module.parameters for module in kept)
    routed = sum(module.parameters for module in kept if module.expert)
    dtypes: Counter[str] = Counter()
    for stored, nbytes in _stored_types(source).values():
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
        quantization=_quantization(source),
        context_length=first_int(
            inner,
            "max_position_embeddings",
            "n_positions",
            "max_sequence_length",
            "max_seq_len",
            "seq_length",
            "n_ctx",
        ),
        layer_count=layers,
        experts=experts(config) if routed else None,
        experts_per_token=experts_per_token(config) if routed else None,
        tied_embeddings=tied,
        embedding=embedding,
        tied_head=embedding if tied else None,
        tokenizer=_tokenizer(source.sidecars, inner),
        modules=modules,
        context=context,
        kv_cache_bytes=kv_cache_bytes(config, context),
        config=config,
    )


def _modules(source: ModelSource) -> tuple[InspectedModule, ...]:
    """Modules in reading order: embedding, layers by number, the rest."""
    stored = {name: kind for name, (kind, _) in _stored_types(source).items()}
    parts: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in source.tensors.items():
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = spec
    found = [row for module, specs in parts.items() for row in _rows(module, specs, source.config, stored)]
    return tuple(sorted(_stacked(found), key=_reading_order))


def _reading_order(module: InspectedModule) -> tuple[int, list[tuple[int, str]]]:
    rank = 1 if layer_index(module.path) is not None else 0 if "emb" in module.path or "wte" in module.path else 2
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in module.path.split(".")]


def _stored_types(source: ModelSource) -> dict[str, tuple[str, int]]:
    """Tensor -> the type it is stored in, and its bytes there: GGML types of a GGUF file, else dtypes."""
    from mlxq.sources.gguf import GGUFSource

    if isinstance(source, GGUFSource):
        return {name: (tensor.stored.ggml_type, tensor.stored.nbytes) for name, tensor in source.bound.items()}
    return {name: (spec.dtype, spec.nbytes) for name, spec in source.tensors.items()}


def _rows(
    module: str, specs: Mapping[str, TensorSpec], config: Mapping[str, Any], stored: Mapping[str, str]
) -> Iterable[InspectedModule]:
    """The weight of one checkpoint module, and its other parameters."""
    # bitsandbytes hangs its helpers under the weight's own name.
    if module.endswith(".weight") and not specs.keys() - _HELPERS - {
        "bitsandbytes__nf4",
        "bitsandbytes__fp4",
    }:
        return
    quantized = {"weight", "qweight", "weight_packed"} & specs.keys() and _HELPERS & specs.keys()
    router = "e_score_correction_bias" in specs
    for part, spec in specs.items():
        if (quantized and part in _HELPERS) or "bitsandbytes__" in part or part.endswith("_scales"):
            continue
        weight = part in ("weight", "qweight", "weight_packed")
        path = module if weight and module else ".".join(filter(None, (module, part.removesuffix("_blocks"))))
        shape, bits, fmt = _logical(path, part, spec, specs, config)
        last = path.rpartition(".")[2]
        expert = bool({"experts", "switch_mlp"} & set(path.split(".")[:-1]))
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


def _logical(
    path: str, part: str, spec: TensorSpec, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> tuple[tuple[int, ...], int, Format | None]:
    """Shape in numbers, bits each number takes, and the MLX format, of a tensor that may hold packed
    words.
    """
    hf = config.get("quantization_config") or {}
    bits = DTYPE_BITS[spec.dtype]
    if part == "weight" and spec.dtype == "U32" and "scales" in specs and config.get("quantization"):
        fmt = _mlx_format(path, config["quantization"])
        return (*spec.shape[:-1], fmt.logical_columns(spec.shape[-1])), fmt.bits, fmt
    if part == "qweight":
        packed = int(hf.get("bits", 4))
        rows, columns = spec.shape
        factor = bits // packed
        # AWQ packs along the outputs, GPTQ along the inputs; both store (in, out).
        is_awq = hf.get("quant_method") == "awq"
        return ((columns * factor, rows) if is_awq else (columns, rows * factor)), packed, None
    if part == "weight_packed":
        packed = _compressed_bits(hf)
        return (*spec.shape[:-1], spec.shape[-1] * bits // packed), packed, None
    if part.endswith("_blocks") and len(spec.shape) >= 2:
        # MXFP4: two numbers a byte, blocks on the last two axes.
        return (*spec.shape[:-2], spec.shape[-2] * spec.shape[-1] * 2), 4, None
    if part == "weight" and spec.dtype == "U8" and TERNARY_SCALE in specs:
        return (spec.shape[0] * TERNARY_PER_BYTE, *spec.shape[1:]), bits // TERNARY_PER_BYTE, None
    if part == "weight" and spec.dtype == "U8" and hf.get("quant_method") == "bitsandbytes":
        return (spec.size * 2,), 4, None
    return spec.shape, bits, None


def _mlx_format(path: str, quantization: Mapping[str, Any]) -> Format:
    own = quantization.get(path)
    entry = own if isinstance(own, Mapping) else quantization
    return Format.from_config({"mode": quantization.get("mode"), **entry})


def _compressed_bits(hf: Mapping[str, Any]) -> int:
    """Bits of compressed-tensors weights: those of its first group."""
    for group in (hf.get("config_groups") or {}).values():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            return int(group["weights"].get("num_bits") or 4)
    return 4


def _stacked(rows: Iterable[InspectedModule]) -> Iterable[InspectedModule]:
    """Rows with ``experts.{i}.`` lists as one row each, under the path and shape ``mlx_lm`` stacks them
    to.
    """
    groups: dict[tuple[str, tuple[int, ...], str, Format | None], list[InspectedModule]] = {}
    for row in rows:
        if found := _EXPERT.fullmatch(row.path):
            head, _, tail = found.groups()
            tail = ".".join(_MIXTRAL.get(part, part) for part in tail.split("."))
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
    copy = tied and module.path.rpartition(".")[2] in ("lm_head", "embed_out")
    return replace(module, kept=not (copy or extra_layer or _LEFT_BEHIND.search(module.path)))


def _quantization(source: ModelSource) -> Quantization | None:
    mlx, hf = source.config.get("quantization"), source.config.get("quantization_config")
    if hf is None and source.weights_folder is not None and (source.weights_folder / "hf_quant_config.json").is_file():
        # NVIDIA ModelOpt says it in a file of its own.
        settings = read_json(source.weights_folder / "hf_quant_config.json").get("quantization", {})
        hf = {"quant_method": "modelopt", **(settings if isinstance(settings, Mapping) else {})}
    if source.kind == "gguf":
        return Quantization("gguf", "blocks of its own types")
    if isinstance(mlx, Mapping):
        top = _mlx_format("", mlx)
        others = sum(isinstance(value, Mapping) for value in mlx.values())
        detail = f"{top.mode}, {top.bits} bits, group size {top.group_size}"
        return Quantization("mlx", detail + (f"; {others} modules differ" if others else ""))
    if isinstance(hf, Mapping) and hf.get("quant_method"):
        wanted = (
            "bits",
            "group_size",
            "fmt",
            "format",
            "weight_block_size",
            "desc_act",
            "bnb_4bit_quant_type",
            "quant_algo",
        )
        detail = ", ".join(f"{key} {hf[key]}" for key in wanted if hf.get(key) is not None)
        return Quantization(str(hf["quant_method"]), detail)
    return None


def _tokenizer(sidecars: Mapping[str, Path | bytes], config: Mapping[str, Any]) -> TokenizerFacts:
    """Facts from ``tokenizer.json``, ``tokenizer_config.json`` and the chat template's own file.

    The vocabulary is the config's where there is no ``tokenizer.json``, as for a model that is still on the Hub.
    """
    tokenizer = _json_sidecar(sidecars, "tokenizer.json")
    settings = _json_sidecar(sidecars, "tokenizer_config.json")
    model = tokenizer.get("model") or {}
    vocabulary = model.get("vocab")
    ids = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary or ())))
    ids |= {token["id"] for token in tokenizer.get("added_tokens") or ()}
    template = "chat_template.jinja" in sidecars or "chat_template.json" in sidecars
    return TokenizerFacts(
        kind=model.get("type") or settings.get("tokenizer_class"),
        vocabulary=len(ids) or first_int(config, "vocab_size"),
        counted=bool(ids),
        chat_template=template or bool(settings.get("chat_template")),
    )


def _json_sidecar(sidecars: Mapping[str, Path | bytes], name: str) -> dict[str, Any]:
    content = sidecars.get(name)
    if content is None:
        return {}
    raw = content if isinstance(content, bytes) else content.read_bytes()
    try:
        data = json.loads(raw)
    except ValueError as exc:
        raise BadInputError(f"{name} is not valid JSON: {exc}", "Download the file again.") from exc
    return data if isinstance(data, dict) else {}


def encode_text(source: ModelSource, text: str) -> Encoding:
    """Encode ``text`` as the model would see it, special tokens included.

    Uses ``tokenizers`` on ``tokenizer.json``, and ``transformers`` only where there is none. Raises
    BadInputError where the model has no tokenizer or it cannot be opened.
    """
    content = source.sidecars.get("tokenizer.json")
    if content is None:
        return _encode_slowly(source, text)
    from tokenizers import Tokenizer

    raw = content if isinstance(content, bytes) else content.read_bytes()
    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as exc:  # tokenizers raises bare Exception for whatever is wrong with the file.
        raise BadInputError(f"{source.name}: tokenizer.json does not open: {exc}") from exc
    encoded = tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(plain.ids, skip_special_tokens=False)
    return Encoding(tuple(encoded.ids), tuple(encoded.tokens), decoded, decoded == text)


def _encode_slowly(source: ModelSource, text: str) -> Encoding:
    """As ``encode_text``, for tokenizers that only ``transformers`` can build."""
    if not {"tokenizer.model", "vocab.json", "tokenizer_config.json"} & source.sidecars.keys():
        raise BadInputError(f"{source.name} has no tokenizer", "Name a folder that holds its tokenizer files.")
    if source.weights_folder is None:
        raise BadInputError(f"{source.name} has no tokenizer.json", "Start from the model's safetensors folder.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.weights_folder)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise BadInputError(f"{source.name}: its tokenizer does not open: {str(exc).splitlines()[0]}") from exc
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    return Encoding(tuple(ids), tuple(tokenizer.convert_ids_to_tokens(ids)), decoded, decoded == text)
