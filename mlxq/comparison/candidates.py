"""From what a person typed after ``mlxq compare`` to models that can be measured.

A folder or Hub id is measured as it stands. A GGUF file is converted to a temporary folder first, in 16 bits. A recipe
is applied to the reference in memory: planned by the same plan that ``mlxq quantize`` would write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.architecture.opening import opened_source
from mlxq.comparison.measure import Candidate, stored_candidate, stored_layer_bits
from mlxq.methods.rtn import RTN
from mlxq.metrics.size import Size
from mlxq.pipeline import Allocated, allocated_plan, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import recipe_from_dict
from mlxq.recipe.match import layer_index
from mlxq.recipe.model import Recipe
from mlxq.sources.base import ModelSource
from mlxq.sources.safetensors import open_folder
from mlxq.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    import mlx.nn as nn


def model_candidate(source: ModelSource, scratch: Path) -> Candidate:
    """A model that exists, its files here. ``scratch`` takes what must be converted, such as a GGUF file.

    Raises BadInputError where ``mlx_lm`` cannot run it.
    """
    name = _short(source.name)
    if source.weights_folder is not None:
        return stored_candidate(name, source)
    folder = scratch / f"{len(list(scratch.iterdir()))}-{name}"
    for _ in run(prepare(recipe_from_dict({}, "mlx"), source), folder):
        pass
    # What it weighs is what its file holds, not what the conversion made of it.
    return replace(stored_candidate(name, open_folder(folder, name)), size=_stored_size(source, folder))


def _stored_size(source: ModelSource, folder: Path) -> Size:
    from mlxq.metrics.size import measure_size

    converted = measure_size(folder)
    stored = source.stored_bytes
    return replace(
        converted, size_bytes=stored, weight_bytes=stored, bits_per_weight=stored * 8 / converted.parameter_count
    )


def recipe_candidate(recipe: Recipe, reference: Candidate, scratch: Path) -> Candidate:
    """``recipe`` applied to ``reference``: in memory where it only rounds, else to a folder in ``scratch``.

    Raises RecipeError where a rule means nothing on it.
    """
    source = reference.source
    assert source is not None, "the reference is a stored model"
    assert source.weights_folder is not None, "what is stored can be opened"
    plan = prepare(recipe, source)
    if recipe.budget is not None:
        plan = next(e.plan for e in allocated_plan(plan) if isinstance(e, Allocated))
    if recipe.method != RTN.name or recipe.budget is not None:
        folder = scratch / f"{len(list(scratch.iterdir()))}-{recipe.name}"
        for _ in run(plan, folder):
            pass
        return stored_candidate(recipe.name, open_folder(folder, recipe.name, trusted=source.trusted))
    return Candidate(
        name=recipe.name,
        load=lambda: _quantized(plan, source),
        load_tokenizer=None,
        size=Size(
            size_bytes=plan.file_bytes,
            weight_bytes=plan.weight_bytes,
            parameter_count=plan.parameter_count,
            bits_per_weight=plan.bits_per_weight,
            module_bits={d.path: d.format.bits for d in plan.decisions if d.format},
        ),
        layer_bits=_planned_layer_bits(plan, stored_layer_bits(source.weights_folder)),
        source=None,
    )


def with_distinct_names(candidates: Sequence[Candidate], texts: Sequence[str]) -> list[Candidate]:
    """Candidates of one name take the folder above from what was typed (``texts``), and a number where all is one."""
    shared = Counter(candidate.name for candidate in candidates)
    taken: Counter[str] = Counter()
    named = []
    for candidate, text in zip(candidates, texts, strict=True):
        name = "/".join(Path(text).parts[-2:]) if shared[candidate.name] > 1 else candidate.name
        taken[name] += 1
        named.append(replace(candidate, name=f"{name} ({taken[name]})" if taken[name] > 1 else name))
    return named


def _quantized(plan: Plan, source: ModelSource) -> nn.Module:
    """The model of ``source``, unevaluated, cast and quantized as ``plan`` says."""
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten, tree_unflatten

    with opened_source(source) as (model, _):
        dtypes = {step.path: step.spec.dtype for step in plan.steps}
        cast = [
            (path, array.astype(getattr(mx, FLOAT_DTYPES[dtypes[path]])))
            for path, array in tree_flatten(model.parameters())
            if dtypes.get(path) in FLOAT_DTYPES
        ]
        model.update(tree_unflatten(cast), strict=False)
        formats = {d.path: d.format for d in plan.decisions}

        def chosen(path: str, module: Any) -> bool | dict[str, int | str]:
            wanted = formats.get(path)
            return wanted.as_config() if wanted is not None and hasattr(module, "to_quantized") else False

        mlx.nn.quantize(model, class_predicate=chosen)
        return model


def _planned_layer_bits(plan: Plan, labels: dict[str, float]) -> dict[str, float]:
    """Bits per weight of each layer as planned, under the labels the reference shows."""
    bits: dict[str, float] = {}
    weights: dict[str, int] = {}
    for step in plan.steps:
        module = step.path.rpartition(".")[0]
        index = layer_index(module)
        label = str(index) if index is not None else module.rpartition(".")[2]
        bits[label] = bits.get(label, 0) + sum(spec.nbytes for spec in step.outputs) * 8
        weights[label] = weights.get(label, 0) + step.spec.size
    return {label: bits[label] / weights[label] for label in labels if label in bits}


def _short(model: str) -> str:
    return model if "/" not in model else Path(model).name
