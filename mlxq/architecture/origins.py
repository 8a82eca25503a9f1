"""Which checkpoint tensors a parameter is made from, read off the graph of what ``sanitize`` returns.

Nothing of the graph is evaluated.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mlxq.architecture.opening import opened_source
from mlxq.errors import BadInputError
from mlxq.recipe.match import layer_index
from mlxq.sources.base import ModelSource

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


def origins(source: ModelSource) -> dict[str, frozenset[str]]:
    """MLX path of each parameter -> the checkpoint tensors it is made from, from headers only.

    Read off the graph of what ``sanitize`` returns, before anything of it is evaluated.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    checkpoint: dict[str, mx.array] = {}
    with opened_source(source, checkpoint) as (model, _):
        parameters = tree_flatten(model.parameters())
    names = list(checkpoint)
    number = {id(array): f"in_{i}" for i, array in enumerate(checkpoint.values())}
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


def check_float8(source: ModelSource, model: nn.Module, names: Mapping[int, str]) -> None:
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
    if not layers or any("scales" in leaf for _, leaf in leaves):
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
