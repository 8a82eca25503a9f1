"""Bind checkpoint tensors to MLX modules, by letting ``mlx_lm`` open the headers and nothing else.

``mlx_lm.utils.load_model`` is run with ``lazy=True``: on the folder itself where it can open it, otherwise on
sparse files that carry the same headers and no data. Its own ``sanitize`` and its own readers of AWQ, GPTQ,
compressed-tensors and MXFP4 checkpoints thus decide names, shapes and dtypes, and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.architecture.config import declared_dtype
from mlxq.architecture.left_out import LeftOut, left_out
from mlxq.architecture.opening import opened_source
from mlxq.architecture.origins import check_float8
from mlxq.architecture.roles import tied_head
from mlxq.errors import BadInputError
from mlxq.methods.formats import Format
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
    left_out: tuple[LeftOut, ...] = ()
    """Parts of the source that the MLX model does not have."""


def bind(source: ModelSource) -> Architecture:
    """Open ``source`` as its MLX model, from headers only.

    Raises BadInputError where ``mlx_lm`` has no such architecture, or cannot read the checkpoint's quantization,
    or where names or shapes do not fit the model.
    """
    checkpoint: dict[str, mx.array] = {}
    with opened_source(source, checkpoint) as (model, config):
        names = {id(array): name for name, array in checkpoint.items()}
        check_float8(source, model, names)
        parameters = _parameters(model, names)
        modules = _modules(model)
        head = tied_head(model, config)
    _check_numbers(source, modules, parameters)
    layers = getattr(model, "layers", None)
    layer_count = len(layers) if layers is not None else int(config.get("num_hidden_layers", 0))
    taken = {parameter.source for parameter in parameters if parameter.source}
    return Architecture(
        model_type=str(config["model_type"]),
        layer_count=layer_count,
        parameters=parameters,
        modules=modules,
        tied_head=head,
        declared_dtype=declared_dtype(config),
        config=_output_config(model, config),
        left_out=left_out(source.tensors, [p.spec.name for p in parameters], taken, layer_count),
    )


def _parameters(model: nn.Module, names: Mapping[int, str]) -> tuple[Parameter, ...]:
    from mlx.utils import tree_flatten

    cast = getattr(model, "cast_predicate", None) or (lambda _: True)
    return tuple(
        Parameter(
            TensorSpec(path, _dtype_code(array, path), tuple(array.shape)),
            names.get(id(array)),
            bool(cast(path)),
        )
        for path, array in tree_flatten(model.parameters())
    )


def _modules(model: nn.Module) -> tuple[Module, ...]:
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    predicate = getattr(model, "quant_predicate", None)
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return tuple(_module(path, leaf, predicate) for path, leaf in leaves if "weight" in leaf)


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
