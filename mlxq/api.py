"""What the commands and the functions of the package (``mlxq.verbs``) are made of: the line, one stage a function.

Nothing is printed. ``on_event`` is called with frozen dataclasses that say how far it is (``Event``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mlxq.errors import BadInputError, GateError
from mlxq.recipe.gates import Gate, GateResult, check_gates, parse_gate
from mlxq.recipe.load import load_recipe, names_recipe, recipe_from_dict, recipe_from_program, shipped_recipes
from mlxq.recipe.model import Recipe
from mlxq.recipe.target import Target
from mlxq.retry import Waiting, told
from mlxq.shown import Shown

if TYPE_CHECKING:
    from mlxq.architecture.inspection import Inspection
    from mlxq.architecture.tokenizer import Encoding
    from mlxq.budget.scoring import Remark, Scoring
    from mlxq.comparison.measure import Candidate, Measuring, Settings
    from mlxq.comparison.result import Comparison
    from mlxq.machine.devices import Device
    from mlxq.machine.memory import Fit
    from mlxq.pipeline import Allocated, Finished, Resumed
    from mlxq.planning.plan import Plan, Stored
    from mlxq.publish.check import Checked
    from mlxq.publish.publish import Doing, Published
    from mlxq.sources.base import ModelSource
    from mlxq.sources.download import Downloading
    from mlxq.sources.sample import Fetching
    from mlxq.writing.execute import Written

    Event: TypeAlias = (
        Waiting
        | Fetching
        | Downloading
        | Scoring
        | Remark
        | Resumed
        | Written
        | Measuring
        | Comparison
        | Checked
        | Doing
    )

OnEvent: TypeAlias = "Callable[[Event], None]"


def ignore(event: Event) -> None:
    """An ``on_event`` that hears nothing."""


@dataclass(frozen=True)
class Inspected(Shown):
    """What is in a model, and whether each shipped recipe's result runs on ``device`` with ``context`` tokens.

    ``encoding`` is what its tokenizer makes of a text, None where it was given none.
    """

    inspection: Inspection
    device: Device
    context: int
    fits: tuple[tuple[str, Fit], ...]
    encoding: Encoding | None


def as_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by name, file or content. Raises RecipeError with all its faults."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return recipe_from_program(recipe, "recipe")
    return load_recipe(str(recipe))


def convert_recipe(dtype: str | None) -> Recipe:
    """The recipe of ``convert``, which only casts. Raises RecipeError where ``dtype`` is none that weights may have."""
    return recipe_from_dict({"dtype": dtype} if dtype else {}, "mlx")


def stored_for_convert(*, dequantize: bool, keep_quantization: bool) -> Stored:
    """What ``convert`` does with what is quantized. Raises BadInputError where it is asked for both."""
    from mlxq.planning.plan import Stored

    if dequantize and keep_quantization:
        raise BadInputError("to dequantize and to keep the quantization exclude each other", "Ask for one of them.")
    if dequantize:
        return Stored.DEQUANTIZE
    return Stored.CARRY_OVER if keep_quantization else Stored.AS_IS


def output_folder(output: str | Path | None, recipe: Recipe, model: str | Path, *, free: bool) -> Path:
    """Where the model goes: ``output``, or the recipe's, or ``./MODEL-RECIPE``.

    Raises BadInputError where it must be ``free`` and something stands there, before any work is done.
    """
    from mlxq.pipeline import default_output

    out = Path(output or recipe.output or default_output(recipe, str(model)))
    if free and out.exists():
        raise BadInputError(f"{out} already exists", "Choose another output, or have it replaced with force.")
    return out


def find_model(
    model: str | Path, *, trusted: bool = False, tokenizer: bool = False, on_event: OnEvent = ignore
) -> ModelSource:
    """Open a model by its headers; its own code may run where it is ``trusted``.

    ``tokenizer`` has the tokenizer fetched with them where the model is on the Hub.
    """
    from mlxq.sources.resolve import resolve

    return resolve(str(model), tokenizer=tokenizer, trusted=trusted, on_event=on_event)


def brought(source: ModelSource, *, on_event: OnEvent = ignore) -> ModelSource:
    """The same source with its files here: where it is on the Hub they are fetched into the cache."""
    from mlxq.sources.download import fetch

    return source if source.remote is None else told(fetch(source), on_event)


def inspected(source: ModelSource, context: int, device: str | None, text: str | None = None) -> Inspected:
    """See ``mlxq.inspect``."""
    from mlxq.architecture.estimate import estimate
    from mlxq.architecture.inspection import inspect_model
    from mlxq.architecture.tokenizer import encode_text
    from mlxq.machine.devices import find_device, this_machine
    from mlxq.machine.memory import fit

    machine = find_device(device) if device else this_machine()
    found = inspect_model(source, context)
    fits = []
    for recipe in shipped_recipes():
        footprint = estimate(found, recipe).footprint(found.config, context)
        fits.append((recipe.name, fit(footprint, machine)))
    encoding = None if text is None else encode_text(source, text)
    return Inspected(found, machine, context, tuple(fits), encoding)


def planned(recipe: Recipe, source: ModelSource, stored: Stored, *, on_event: OnEvent = ignore) -> Plan:
    """The plan, its budget spent where it has one."""
    from mlxq.pipeline import default_output, prepare

    draft = prepare(recipe, source, stored)
    if recipe.budget is None:
        return draft
    return spent(draft, default_output(recipe, source.name), on_event=on_event).plan


def spent(draft: Plan, out: Path, *, measure_curve: bool = False, on_event: OnEvent = ignore) -> Allocated:
    """A plan's budget spent, its weights fetched first where the disk has room for them and for ``out``.

    ``measure_curve`` also measures other sizes.
    """
    from mlxq.pipeline import Allocated, allocated_plan, with_weights

    here = draft if draft.source.remote is None else told(with_weights(draft, out), on_event)
    for event in allocated_plan(here, measure_curve=measure_curve):
        if isinstance(event, Allocated):
            return event
        on_event(event)
    raise AssertionError("a budget ends with how it was spent")


def write(
    made: Plan, out: Path, *, force: bool = False, low_disk: bool = False, on_event: OnEvent = ignore
) -> Finished:
    """Write a plan to ``out``; see ``mlxq.pipeline.run``."""
    from mlxq.pipeline import Finished, run

    for event in run(made, out, force=force, low_disk=low_disk):
        if isinstance(event, Finished):
            return event
        on_event(event)
    raise AssertionError("a run ends with what it finished")


def compared(
    reference: str | Path,
    candidates: Sequence[str | Path | Mapping[str, Any] | Recipe],
    settings: Settings,
    *,
    trusted: bool = False,
    on_event: OnEvent = ignore,
) -> Comparison:
    """Measure ``candidates`` beside ``reference``; what is measured of a stored one goes into its ``mlxq.json``."""
    from mlxq.comparison.candidates import model_candidate, recipe_candidate, with_distinct_names

    recipes = {i: as_recipe(each) for i, each in enumerate(candidates) if _is_recipe(each)}
    names = [str(reference), *(recipes[i].name if i in recipes else str(c) for i, c in enumerate(candidates))]
    models = {0: reference, **{i + 1: str(c) for i, c in enumerate(candidates) if i not in recipes}}
    sources = {
        i: brought(find_model(model, trusted=trusted, on_event=on_event), on_event=on_event)
        for i, model in models.items()
    }
    with tempfile.TemporaryDirectory(prefix="mlxq-compare-") as temporary:
        scratch = Path(temporary)
        original = model_candidate(sources[0], scratch)
        measured = [
            recipe_candidate(recipes[i], original, scratch)
            if i in recipes
            else model_candidate(sources[i + 1], scratch)
            for i in range(len(candidates))
        ]
        return measure(with_distinct_names([original, *measured], names), settings, on_event=on_event)


def measure(models: Sequence[Candidate], settings: Settings, *, on_event: OnEvent = ignore) -> Comparison:
    """Compare the first of ``models`` with the others; each result is kept as soon as it is there."""
    from mlxq.comparison.measure import compare as comparing
    from mlxq.comparison.report import keep_result
    from mlxq.comparison.result import Comparison

    done: Comparison | None = None
    for event in comparing(models[0], models[1:], settings):
        if isinstance(event, Comparison):
            done = event
            if (unwritten := keep_result(event, models)) is not None:
                on_event(unwritten)
        on_event(event)
    assert done is not None, "a comparison ends with its results"
    return done


def gate_results(gates: Sequence[Gate], comparison: Comparison) -> tuple[GateResult, ...]:
    """Every gate against every candidate."""
    return check_gates(gates, {result.name: result.metrics() for result in comparison.candidates})


def check_recipe_gates(made: Plan, out: Path, *, on_event: OnEvent = ignore) -> tuple[GateResult, ...]:
    """Hold the model in ``out`` against its recipe's gates, comparing it with what it was made from."""
    if not made.recipe.gates:
        return ()
    from mlxq.comparison.candidates import model_candidate
    from mlxq.comparison.measure import Settings
    from mlxq.running.speed import SPEED_METRICS, usual_settings

    gates = [parse_gate(line) for line in made.recipe.gates]
    timed = usual_settings() if any(gate.metric in SPEED_METRICS for gate in gates) else None
    written = find_model(out, trusted=made.source.trusted)
    with tempfile.TemporaryDirectory(prefix="mlxq-compare-") as scratch:
        original = model_candidate(brought(made.source, on_event=on_event), Path(scratch))
        models = [original, model_candidate(written, Path(scratch))]
        return gate_results(gates, measure(models, Settings(speed=timed), on_event=on_event))


def require_gates(results: Iterable[GateResult], out: Path | None = None) -> None:
    """Raise GateError with a line for each gate that failed."""
    if failed := [result for result in results if not result.passed]:
        hint = None if out is None else f"The model is in {out}."
        raise GateError("\n".join(f"gate failed for {result}" for result in failed), hint)


def published(
    folder: Path, target: Target, *, force: bool = False, trusted: bool = False, on_event: OnEvent = ignore
) -> Published:
    """Check a folder and publish it."""
    from mlxq.publish.publish import Published, publish

    for event in publish(checked(folder, target, force=force, trusted=trusted, on_event=on_event), target, force=force):
        if isinstance(event, Published):
            return event
        on_event(event)
    raise AssertionError("publishing ends with what was published")


def checked(
    folder: Path, target: Target, *, force: bool = False, trusted: bool = False, on_event: OnEvent = ignore
) -> Checked:
    """Prove a folder before it is published; what ``force`` let pass is in what ``on_event`` is told."""
    from mlxq.publish.check import check_folder, check_target
    from mlxq.publish.publish import Doing

    check_target(target)
    on_event(Doing(f"checking every file of {folder}"))
    found = check_folder(folder, force=force, trusted=trusted)
    on_event(found)
    return found


def _is_recipe(candidate: str | Path | Mapping[str, Any] | Recipe) -> bool:
    return isinstance(candidate, Mapping | Recipe) or names_recipe(str(candidate))
