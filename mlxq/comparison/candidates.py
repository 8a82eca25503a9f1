"""From what a person typed after ``mlxq compare`` to models that can be measured.

A folder or Hub id is measured as it stands. A GGUF file is converted to a temporary folder first, in 16 bits. A recipe
is applied to the reference in memory: planned by the same plan that ``mlxq quantize`` would write.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.architecture.opening import open_lazily
from mlxq.comparison.measure import Candidate, folder_candidate, stored_layer_bits
from mlxq.errors import BadInputError
from mlxq.methods.rtn import RTN
from mlxq.metrics.size import Size
from mlxq.pipeline import Allocated, Options, allocated_plan, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import load_recipe, names_recipe, recipe_from_dict
from mlxq.recipe.match import layer_index
from mlxq.recipe.model import Recipe
from mlxq.sources.base import ModelSource
from mlxq.sources.download import fetched_source
from mlxq.sources.resolve import resolve
from mlxq.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    import mlx.nn as nn


def model_candidate(model: str, scratch: Path) -> Candidate:
    """A model that exists: folder, Hub id, GGUF file or ``sample``. ``scratch`` takes what must be converted.

    Raises BadInputError where there is no such model or ``mlx_lm`` cannot run it.
    """
    source = fetched_source(resolve(model))
    name = _short(model)
    folder = scratch / f"{len(list(scratch.iterdir()))}-{name}"
    if source.weights_folder is not None and source.revision is None:
        return folder_candidate(name, source.weights_folder)
    if source.weights_folder is not None:
        # The links to the files of a Hub model go when its source does.
        shutil.copytree(source.weights_folder, folder, symlinks=True)
        return folder_candidate(name, folder)
    options = Options()
    for _ in run(prepare(recipe_from_dict({}, "mlx"), model, options), folder, options):
        pass
    # What it weighs is what its file holds, not what the conversion made of it.
    return replace(folder_candidate(name, folder), size=_stored_size(source, folder))


def _stored_size(source: ModelSource, folder: Path) -> Size:
    from mlxq.metrics.size import measure_size

    converted = measure_size(folder)
    stored = source.stored_bytes
    return replace(
        converted, size_bytes=stored, weight_bytes=stored, bits_per_weight=stored * 8 / converted.parameter_count
    )


def recipe_candidate(recipe: Recipe, reference: Candidate) -> Candidate:
    """``recipe`` applied to ``reference`` in memory. Raises RecipeError where a rule means nothing on it."""
    if reference.folder is None:
        raise BadInputError("a recipe needs a reference that is stored in a folder")
    folder = reference.folder
    plan = prepare(recipe, str(folder), Options())
    return Candidate(
        name=recipe.name,
        load=lambda: _quantized(plan, folder),
        load_tokenizer=None,
        size=Size(
            size_bytes=plan.file_bytes,
            weight_bytes=plan.weight_bytes,
            parameter_count=plan.parameter_count,
            bits_per_weight=plan.bits_per_weight,
            module_bits={d.path: d.format.bits for d in plan.decisions if d.format},
        ),
        layer_bits=_planned_layer_bits(plan, stored_layer_bits(folder)),
        folder=None,
    )


def load_candidate(text: str, reference: Candidate, scratch: Path) -> Candidate:
    """A model or a recipe, whichever ``text`` names.

    A recipe that does more than round (a method, a budget) is carried out to a folder in ``scratch``.
    """
    if not names_recipe(text):
        return model_candidate(text, scratch)
    recipe = load_recipe(text)
    if recipe.method == RTN.name and recipe.budget is None:
        return recipe_candidate(recipe, reference)
    if reference.folder is None:
        raise BadInputError("a recipe needs a reference that is stored in a folder")
    options = Options()
    plan = prepare(recipe, str(reference.folder), options)
    if recipe.budget is not None:
        plan = next(e.plan for e in allocated_plan(plan, options) if isinstance(e, Allocated))
    folder = scratch / f"{len(list(scratch.iterdir()))}-{recipe.name}"
    for _ in run(plan, folder, options):
        pass
    return folder_candidate(recipe.name, folder)


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


def _quantized(plan: Plan, folder: Path) -> nn.Module:
    """The model of ``folder``, unevaluated, cast and quantized as ``plan`` says."""
    import mlx.core as mx
    import mlx.nn
    from mlx.utils import tree_flatten, tree_unflatten

    model, _ = open_lazily(folder, plan.source.name)
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
