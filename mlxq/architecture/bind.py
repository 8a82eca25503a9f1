"""Bind checkpoint tensors to MLX modules, by letting ``mlx_lm`` open the headers and nothing else.

``mlx_lm.utils.load_model`` is run with ``lazy=True``: on the folder itself where it can open it, otherwise on
sparse files that carry the same headers and no data. Its own ``sanitize`` and its own readers of AWQ, GPTQ,
compressed-tensors and MXFP4 checkpoints thus decide names, shapes and dtypes, and nothing is allocated.
"""

from __future__ import annotations

import inspect
import io
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError, MlxqError
from mlxq.methods.formats import Format
from mlxq.recipe.match import layer_index
from mlxq.sources.base import ModelSource
from mlxq.tensors import FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


@dataclass(frozen=True)
class Parameter:
    """One parameter of the MLX model, before anything is done to it.

    ``spec`` has its MLX path, stored dtype and shape. ``source`` names the checkpoint tensor it is byte for byte,
    or is None where ``sanitize`` assembles it from others. ``castable`` is the model's own ``cast_predicate``.
    """

    spec: TensorSpec
    source: str | None
    castable: bool


@dataclass(frozen=True)
class Module:
    """One module with a weight.

    ``shape`` is the logical shape of its weight. ``asked`` is what the model's ``quant_predicate`` says of it:
    True (as the recipe likes), False (leave alone) or a format. ``stored`` is the format it is already in.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    quantizable: bool
    asked: bool | Format
    stored: Format | None


@dataclass(frozen=True)
class Architecture:
    """The MLX model that a checkpoint becomes. ``tied_head`` is the embedding that also serves as the head."""

    model_type: str
    layer_count: int
    parameters: tuple[Parameter, ...]
    modules: tuple[Module, ...]
    tied_head: str | None
    declared_dtype: str | None
    config: Mapping[str, Any]


def bind(source: ModelSource, *, trust_remote_code: bool = False) -> Architecture:
    """Open ``source`` as its MLX model, from headers only.

    Raises BadInputError where ``mlx_lm`` has no such architecture, or cannot read the checkpoint's quantization,
    or where names or shapes do not fit the model.
    """
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    checkpoint: dict[str, mx.array] = {}
    with openable_folder(source) as folder:
        model, config = open_lazily(folder, source.name, checkpoint, trust_remote_code=trust_remote_code)
    names = {id(array): name for name, array in checkpoint.items()}
    _check_float8(source, model, names)
    cast = getattr(model, "cast_predicate", None) or (lambda _: True)
    parameters = tuple(
        Parameter(
            TensorSpec(path, _dtype_code(array, path), tuple(array.shape)),
            names.get(id(array)),
            bool(cast(path)),
        )
        for path, array in tree_flatten(model.parameters())
    )
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    predicate = getattr(model, "quant_predicate", None)
    modules = tuple(_module(path, leaf, predicate) for path, leaf in leaves if "weight" in leaf)
    _check_numbers(source, modules, parameters)
    layers = getattr(model, "layers", None)
    declared = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return Architecture(
        model_type=str(config["model_type"]),
        layer_count=len(layers) if layers is not None else int(config.get("num_hidden_layers", 0)),
        parameters=parameters,
        modules=modules,
        tied_head=_tied_head(leaves),
        declared_dtype=declared if declared in {"float16", "bfloat16", "float32"} else None,
        config=_output_config(model, config),
    )


def open_lazily(
    folder: Path, name: str, checkpoint: dict[str, mx.array] | None = None, *, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Open a folder with ``mlx_lm``, every parameter unevaluated, and its config.

    ``checkpoint``, where given, is filled with the arrays as the files name them, before ``sanitize``.
    """
    import mlx_lm.utils

    find_classes = inspect.signature(mlx_lm.utils.load_model).parameters["get_model_classes"].default

    def observed_classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, args_class = find_classes(config)

        class Observed(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                if checkpoint is not None:
                    checkpoint.update(weights)
                parent = getattr(super(), "sanitize", None)
                return parent(weights) if parent else weights

        Observed.__name__ = model_class.__name__
        return Observed, args_class

    try:
        model, config = mlx_lm.utils.load_model(
            folder,
            lazy=True,
            strict=True,
            get_model_classes=observed_classes,
            trust_remote_code=trust_remote_code,
        )
    except MlxqError:
        raise
    except Exception as exc:  # mlx_lm raises whatever its model files raise; all of it means: cannot open.
        raise _explained(exc, folder, name) from exc
    return model, config


def _explained(exc: Exception, folder: Path, name: str) -> BadInputError:
    """Turn what ``mlx_lm`` raised into one line and a way forward."""
    # Some messages list the parameters they mean on the lines that follow.
    said = " ".join(str(exc).split()) or type(exc).__name__
    said = said if len(said) <= 300 else said[:300] + " ..."
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is None and (folder / "hf_quant_config.json").is_file():
        method = "modelopt"
    if "model_type" not in config:
        return BadInputError(f"{name}: config.json has no model_type", "It is no language model mlx-lm knows.")
    if "not supported" in said and "Model type" in said:
        return BadInputError(
            f"{name}: this mlx-lm has no architecture {config['model_type']!r}", "Try: pip install -U mlx-lm"
        )
    if "trust_remote_code" in said:
        return BadInputError(
            f"{name} wants to run its own code ({config.get('model_file')})",
            "Read that file; if you trust it, add --trust-remote-code.",
        )
    if method is not None:
        return BadInputError(
            f"{name} is quantized as {method!r} in a way mlx-lm cannot read: {said}",
            "Start from the unquantized original, or dequantize it to bfloat16 with the tool that made it.",
        )
    return BadInputError(
        f"{name} does not fit mlx-lm's {config['model_type']!r} model: {type(exc).__name__}: {said}",
        "The checkpoint may be incomplete, or of a newer kind: try pip install -U mlx-lm",
    )


@contextmanager
def openable_folder(source: ModelSource) -> Iterator[Path]:
    """A folder ``mlx_lm`` can open for its headers: the source's own, or sparse files with the same header."""
    if source.weights_folder is not None:
        yield source.weights_folder
        return
    with tempfile.TemporaryDirectory(prefix="mlxq-headers-") as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(dict(source.config)), encoding="utf-8")
        generation = source.sidecars.get("generation_config.json")
        if generation is not None:
            data = generation if isinstance(generation, bytes) else generation.read_bytes()
            (folder / "generation_config.json").write_bytes(data)
        header = encode_header(source.tensors.values(), {})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            os.truncate(file.fileno(), len(header) + sum(spec.nbytes for spec in source.tensors.values()))
        yield folder


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header for ``specs`` laid out one after another, its length included, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def origins(source: ModelSource, *, trust_remote_code: bool = False) -> dict[str, frozenset[str]]:
    """MLX path of each parameter -> the checkpoint tensors it is made from, from headers only.

    Read off the graph of what ``sanitize`` returns, before anything of it is evaluated.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    checkpoint: dict[str, mx.array] = {}
    with openable_folder(source) as folder:
        model, _ = open_lazily(folder, source.name, checkpoint, trust_remote_code=trust_remote_code)
    names = list(checkpoint)
    number = {id(array): f"in_{i}" for i, array in enumerate(checkpoint.values())}
    parameters = tree_flatten(model.parameters())
    labels = {path: number.get(id(array), f"out_{i}") for i, (path, array) in enumerate(parameters)}
    graph = io.StringIO()
    # A tensor taken over as it is keeps its name as an input.
    outputs = {labels[path]: array for path, array in parameters if id(array) not in number}
    inputs = {number[id(array)]: array for array in checkpoint.values()}
    mx.export_to_dot(graph, *outputs.values(), **outputs, **inputs)
    parents: dict[str, list[str]] = {}
    for line in graph.getvalue().splitlines():
        parent, arrow, child = line.replace('"', "").partition(" -> ")
        if arrow:
            parents.setdefault(child, []).append(parent)
    return {
        path: frozenset(names[int(leaf.removeprefix("in_"))] for leaf in _leaves(label, parents))
        for path, label in labels.items()
    }


def _leaves(node: str, parents: Mapping[str, list[str]]) -> set[str]:
    """The checkpoint tensors a node of a graph stands on: the nearest ``in_`` nodes above it."""
    found, seen, waiting = set(), {node}, [node]
    while waiting:
        current = waiting.pop()
        if current.startswith("in_"):
            found.add(current)
            continue
        above = [each for each in parents.get(current, ()) if each not in seen]
        seen.update(above)
        waiting += above
    return found


def _check_float8(source: ModelSource, model: nn.Module, names: Mapping[int, str]) -> None:
    """Raise BadInputError where ``sanitize`` multiplies the bytes of FP8 numbers as if they were integers.

    MLX opens FP8 tensors as uint8, and a model file must decode them with ``mx.from_fp8``; some do not. The graph
    of what ``sanitize`` makes of the first layer that has them shows which. Packed modules (mxfp8) take the bytes
    as they are.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    layers = {layer_index(name) for name, spec in source.tensors.items() if spec.dtype == "F8_E4M3"} - {None}
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    if not layers or any(Format.of_module(leaf) for _, leaf in leaves):
        return
    first = min(layer for layer in layers if layer is not None)
    made = [
        array
        for path, array in tree_flatten(model.parameters())
        if layer_index(path) == first and id(array) not in names and mx.issubdtype(array.dtype, mx.floating)
    ]
    graph = io.StringIO()
    mx.export_to_dot(graph, *made)
    if made and "FromFP8" not in graph.getvalue():
        raise BadInputError(
            f"{source.name} holds FP8 weights, which this mlx-lm's {source.config.get('model_type')!r} model misreads",
            "Dequantize it to bfloat16 first with the tool that made it, or try: pip install -U mlx-lm",
        )


def _check_numbers(source: ModelSource, modules: Iterable[Module], parameters: Iterable[Parameter]) -> None:
    """Raise BadInputError where a linear layer's weight is not of a float dtype: packed by a tool left unnamed."""
    weights = {parameter.spec.name: parameter for parameter in parameters}
    for module in modules:
        weight = weights[f"{module.path}.weight"]
        if module.quantizable and not module.stored and weight.spec.dtype not in FLOAT_DTYPES:
            held = source.tensors[weight.source].dtype if weight.source else weight.spec.dtype
            raise BadInputError(
                f"{source.name}: {module.path}.weight is stored in {held}, and nothing says how to read it as numbers",
                "Start from the unquantized original, or dequantize it to bfloat16 with the tool that made it.",
            )


def _dtype_code(array: mx.array, path: str) -> str:
    import mlx.core as mx

    codes = {
        mx.bool_: "BOOL",
        mx.uint8: "U8",
        mx.int8: "I8",
        mx.uint16: "U16",
        mx.int16: "I16",
        mx.uint32: "U32",
        mx.int32: "I32",
        mx.uint64: "U64",
        mx.int64: "I64",
        mx.float16: "F16",
        mx.bfloat16: "BF16",
        mx.float32: "F32",
    }
    if array.dtype not in codes:
        raise BadInputError(f"{path} has dtype {array.dtype}, which MLX models do not store")
    return codes[array.dtype]


def _module(path: str, leaf: nn.Module, predicate: Any) -> Module:
    stored = Format.of_module(leaf)
    shape = tuple(leaf["weight"].shape)
    if stored:
        shape = (*shape[:-1], stored.logical_columns(shape[-1]))
    quantizable = hasattr(leaf, "to_quantized")
    asked: bool | Format = True
    if quantizable and predicate is not None:
        said = predicate(path, leaf)
        asked = Format.from_config(said) if isinstance(said, dict) else bool(said)
    return Module(path, type(leaf).__name__, shape, quantizable, asked, stored)


def _tied_head(leaves: list[tuple[str, nn.Module]]) -> str | None:
    """The embedding that doubles as the output head: the only embedding, where no linear layer has its rows."""
    embeddings = [(path, leaf) for path, leaf in leaves if "Embedding" in type(leaf).__name__ and "weight" in leaf]
    if not embeddings:
        return None
    path, embedding = max(embeddings, key=lambda item: item[1]["weight"].shape[0])
    vocabulary = embedding["weight"].shape[0]
    heads = [
        other
        for name, other in leaves
        if name != path and "weight" in other and other["weight"].ndim == 2 and other["weight"].shape[0] == vocabulary
    ]
    return None if heads else path


def _output_config(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config to write: what ``mlx_lm.utils.save_config`` keeps of it.

    Without quantization, which the plan writes anew; only BitNet's stays, as no MLX format says the same.
    """
    dropped = {"_name_or_path", "quantization"}
    if (config.get("quantization_config") or {}).get("quant_method") != "bitnet":
        dropped.add("quantization_config")
    if "vision_tower" not in getattr(model, "model", {}):
        dropped.add("vision_config")
    return {key: value for key, value in sorted(config.items()) if key not in dropped}
