"""Recipe x model -> Plan."""

from __future__ import annotations

from dataclasses import replace

from mlxq.architecture.bind import Architecture, Parameter
from mlxq.errors import BadInputError
from mlxq.planning.decide import Ground, decide
from mlxq.planning.layout import config_of, count_parameters, shards_of, steps_of
from mlxq.planning.plan import Plan, Spent, Stored
from mlxq.recipe.model import Recipe
from mlxq.sources.base import ModelSource
from mlxq.tensors import DTYPE_BY_NAME, FLOAT_DTYPES


def make_plan(
    source: ModelSource,
    recipe: Recipe,
    architecture: Architecture,
    stored: Stored = Stored.AS_IS,
    *,
    spent: Spent | None = None,
    uncalibrated: str | None = None,
) -> Plan:
    """Decide every module and lay out every byte.

    ``stored`` says how modules are taken that the source holds quantized. ``spent`` is what the recipe's budget came
    to; without it the modules that a budget decides stay unquantized. ``uncalibrated`` says why the recipe's
    calibration cannot be used on this model.
    Raises RecipeError where a rule means nothing on this model, BadInputError where the recipe quantizes what is
    quantized already and ``stored`` leaves it as it is, or where the source cannot be read as the plan needs.
    """
    _check_what_is_stored(source, recipe, architecture, stored)
    # Repacked blocks keep their F16 scales; a second float type beside them would make every sum a float32.
    dtype = recipe.dtype or ("float16" if stored is Stored.CARRY_OVER else architecture.declared_dtype)
    written = {p.spec.name: replace(p.spec, dtype=_written_dtype(p, dtype)) for p in architecture.parameters}
    ground = Ground(
        source=source,
        architecture=architecture,
        recipe=recipe,
        stored=stored,
        written=written,
        allocated=spent.formats if spent else {},
        calibrated=uncalibrated is None and recipe.calibration.has_text,
    )
    by_path = decide(ground)
    decisions = tuple(by_path.values())
    steps = steps_of(architecture, by_path, written, stored)
    if source.weights_folder is None and (unmapped := [s.path for s in steps if s.source is None]):
        raise BadInputError(
            f"{source.name}: {unmapped[0]} cannot be read straight from a {source.kind} file",
            "Start from the model's safetensors instead.",
        )
    return Plan(
        source=source,
        recipe=recipe,
        stored=stored,
        architecture=architecture,
        decisions=decisions,
        steps=steps,
        shards=shards_of(steps),
        config=config_of(architecture, recipe, decisions),
        parameter_count=count_parameters(architecture),
        uncalibrated=uncalibrated,
        spending=spent.facts if spent else None,
    )


def _check_what_is_stored(source: ModelSource, recipe: Recipe, architecture: Architecture, stored: Stored) -> None:
    quantizes = recipe.default is not None or bool(recipe.rules) or recipe.budget is not None
    if source.config.get("quantization") is not None and quantizes and stored is not Stored.REQUANTIZE:
        raise BadInputError(
            f"{source.name} is already quantized for MLX",
            "Start from its original for the best result; --requantize dequantizes this one first, "
            "and mlxq convert --dequantize writes it as plain numbers.",
        )
    foreign = architecture.config.get("quantization_config")
    if foreign is not None and (quantizes or stored.opened):
        raise BadInputError(
            f"{source.name} is quantized as {foreign['quant_method']!r}, which only stays as it is",
            "mlxq convert carries it over; to quantize, start from the model it was made of.",
        )


def _written_dtype(parameter: Parameter, dtype: str | None) -> str:
    """The dtype a parameter is written in, as long as it is not quantized."""
    if dtype is None or not parameter.castable or parameter.spec.dtype not in FLOAT_DTYPES:
        return parameter.spec.dtype
    return DTYPE_BY_NAME[dtype]
