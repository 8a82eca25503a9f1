"""Recipe x modules -> one decision a module: rule, default or budget, then what the model asks, then its width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlxq.architecture.bind import Architecture, Module
from mlxq.errors import BadInputError, RecipeError
from mlxq.methods.formats import PARTS, Format
from mlxq.methods.method import Needs, given_by_text
from mlxq.methods.registry import choose
from mlxq.methods.rtn import RTN
from mlxq.planning.plan import By, Decision, Stored
from mlxq.recipe.match import Match, assign, matches, names_module
from mlxq.recipe.model import Recipe, Rule
from mlxq.sources.base import ModelSource
from mlxq.tensors import FLOAT_DTYPES, TensorSpec


@dataclass(frozen=True)
class Ground:
    """What every decision stands on.

    ``written`` has each parameter, by path, as it is written where it is not quantized. ``allocated`` is what a budget
    came to, by module; one that it does not name stays unquantized. ``calibrated`` says that there is text to
    calibrate on.
    """

    source: ModelSource
    architecture: Architecture
    recipe: Recipe
    stored: Stored
    written: Mapping[str, TensorSpec]
    allocated: Mapping[str, Format | None]
    calibrated: bool


@dataclass(frozen=True)
class _Choice:
    """A format (None: numbers in ``dtype``) on its way to a decision: who wants it, and what had to be changed."""

    format: Format | None
    dtype: str
    by: By
    where: str | None = None
    note: str | None = None
    misfit: bool = False


def decide(ground: Ground) -> dict[str, Decision]:
    """A decision for each module that can be quantized, or is, by path.

    Raises RecipeError where a rule means nothing on this model or, if strict, a width fits no group; BadInputError
    where GGUF blocks are to be carried over and there are none that can be.
    """
    recipe, architecture = ground.recipe, ground.architecture
    modules = tuple(m for m in architecture.modules if m.quantizable or m.stored)
    found, faults = assign(recipe.rules, [m.path for m in modules], architecture.layer_count, architecture.tied_head)
    if faults:
        raise RecipeError(faults, "mlxq inspect MODEL --layers lists every module path.")
    if ground.stored is Stored.CARRY_OVER:
        choices = _carried_over(ground, modules)
    else:
        choices = [_chosen(ground, module, match) for module, match in zip(modules, found, strict=True)]
    if recipe.strict and (unfit := [(m, c) for m, c in zip(modules, choices, strict=True) if c.misfit]):
        raise RecipeError(
            tuple(f"{module.path}: {choice.note}" for module, choice in unfit),
            "strict: true forbids this; give these modules a rule of their own.",
        )
    return {
        module.path: _decision(ground, module, match, choice)
        for module, match, choice in zip(modules, found, choices, strict=True)
    }


def _decision(ground: Ground, module: Module, match: Match, choice: _Choice) -> Decision:
    fmt, given = choice.format, _given(ground, module)
    taken_over = fmt == module.stored or choice.by is By.BLOCKS
    method = RTN if fmt is None or taken_over else choose(ground.recipe.method, fmt, given)
    return Decision(
        path=module.path,
        shape=module.shape,
        dtype=choice.dtype,
        format=fmt,
        quantizable=module.quantizable or ground.stored.opened,
        by=choice.by,
        where=choice.where,
        also=tuple(ground.recipe.rules[i].where for i in match.also),
        asked=None if module.asked is True else str(module.asked or "not quantized"),
        note=choice.note,
        misfit=choice.misfit,
        method=method.name,
        guided=bool(method.uses & given),
        nbytes=_nbytes(ground, module, choice),
    )


def _chosen(ground: Ground, module: Module, match: Match) -> _Choice:
    """What the recipe wants for a module, as far as the model and its width let it."""
    dtype = _number_dtype(ground, module)
    if module.stored and not ground.stored.opened:
        return _Choice(module.stored, dtype, By.SOURCE)
    rule = ground.recipe.rules[match.rule] if match.rule is not None else None
    if rule is not None:
        note = _tied_note(rule, module, ground.architecture)
        wanted = _Choice(rule.format, dtype, By.RULE, rule.where, note)
    elif ground.recipe.budget is not None:
        wanted = _Choice(ground.allocated.get(module.path), dtype, By.BUDGET)
    else:
        wanted = _Choice(ground.recipe.default, dtype, By.DEFAULT)
    if rule is None or not _named_by(rule, module.path, ground.architecture):
        wanted = _not_below_what_is_asked(wanted, module)
    return _fitted(wanted, module)


def _not_below_what_is_asked(wanted: _Choice, module: Module) -> _Choice:
    """What the model asks for is a floor; only a rule that names the module goes below it."""
    if wanted.format is None or module.asked is True:
        return wanted
    if module.asked is False:
        return replace(wanted, format=None, by=By.MODEL, where=None)
    if wanted.format.bits <= module.asked.bits:
        return replace(wanted, format=module.asked, by=By.MODEL, where=None)
    return wanted


def _fitted(wanted: _Choice, module: Module) -> _Choice:
    """The group size that divides the module's width, or no format where none does."""
    fmt, columns = wanted.format, module.shape[-1]
    if fmt is None or fmt == module.stored:
        return wanted
    fitting = fmt.fitted_to(columns)
    if fitting == fmt:
        return wanted
    if fitting is None:
        kept = FLOAT_DTYPES[wanted.dtype]
        note = f"its width {columns} is no multiple of any group size of {fmt.mode}; kept in {kept}"
    else:
        note = f"its width {columns} is no multiple of {fmt.group_size}; group size {fitting.group_size} instead"
    return replace(wanted, format=fitting, note=note, misfit=True)


def _carried_over(ground: Ground, modules: tuple[Module, ...]) -> list[_Choice]:
    """The formats that hold modules' GGUF blocks exactly; scales are F16, as the blocks have them."""
    sources = {parameter.spec.name: parameter.source for parameter in ground.architecture.parameters}
    choices = []
    for module in modules:
        origin = sources[f"{module.path}.weight"]
        held = ground.source.repack_format(origin) if origin and module.quantizable else None
        number_dtype = _number_dtype(ground, module)
        choices.append(_Choice(held, "F16", By.BLOCKS) if held else _Choice(None, number_dtype, By.NUMBERS))
    if not any(choice.format for choice in choices):
        raise BadInputError(
            f"{ground.source.name} has no blocks that an MLX format holds exactly",
            "Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 of GGUF files do; leave --keep-quantization out, or quantize.",
        )
    return choices


def _number_dtype(ground: Ground, module: Module) -> str:
    """The dtype of a module's weights as numbers: of what is stored quantized its scales', where they have one."""
    if module.stored is None:
        return ground.written[f"{module.path}.weight"].dtype
    scales = ground.written[f"{module.path}.scales"].dtype
    return scales if scales in FLOAT_DTYPES else "BF16"


def _given(ground: Ground, module: Module) -> Needs:
    """What calibration can say of a module.

    Nothing of one that only looks rows up, for it multiplies no vectors, nor of one that is stored quantized:
    calibration runs on plain weights.
    """
    looks_up_only = "Embedding" in module.kind and module.path != ground.architecture.tied_head
    if looks_up_only or module.stored or not ground.calibrated:
        return Needs.NOTHING
    return given_by_text(module.shape)


def _nbytes(ground: Ground, module: Module, choice: _Choice) -> int:
    """Bytes of all that stores a module's weight."""
    if choice.by is By.SOURCE:
        return sum(spec.nbytes for part in PARTS if (spec := ground.written.get(f"{module.path}.{part}")))
    spec = TensorSpec(f"{module.path}.weight", choice.dtype, module.shape)
    return sum(part.nbytes for part in (choice.format.layout(spec) if choice.format else (spec,)))


def _tied_note(rule: Rule, module: Module, architecture: Architecture) -> str | None:
    tied = module.path == architecture.tied_head
    if not tied or "lm_head" not in rule.patterns or any(matches(p, module.path) for p in rule.patterns):
        return None
    return "the head is tied to this embedding, so the rule for lm_head applies here"


def _named_by(rule: Rule, path: str, architecture: Architecture) -> bool:
    """Does a pattern that names modules (rather than sweeps over them) match ``path``?"""
    aliases = (path, "lm_head") if path == architecture.tied_head else (path,)
    return any(names_module(p) and any(matches(p, alias) for alias in aliases) for p in rule.patterns)
