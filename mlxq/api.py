"""The verbs as functions: what each command does, without a word printed. The commands are built on these.

A model is what the commands take: a folder, a ``.gguf`` file, ``org/name[@revision]``, or ``sample``. A recipe is the
name of a shipped one, a file, a dict of what such a file holds, or a ``Recipe``. ``on_event`` is called with frozen
dataclasses that say how far it is (``Event``); what it raises ends the run, which the same call continues.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mlxq.errors import BadInputError, GateError
from mlxq.machine.backend import start_mlx
from mlxq.recipe.gates import Gate, GateResult, check_gates, parse_gate
from mlxq.recipe.load import load_recipe, names_recipe, recipe_from_dict, shipped_recipes
from mlxq.recipe.model import Recipe
from mlxq.recipe.target import Target
from mlxq.retry import Waiting, told

if TYPE_CHECKING:
    from mlxq.architecture.inspection import Inspection
    from mlxq.budget.scoring import Remark, Scoring
    from mlxq.comparison.measure import Candidate, Comparison, Measuring, Settings
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
class Inspected:
    """What is in a model, and whether each shipped recipe's result runs on ``device`` with ``context`` tokens."""

    inspection: Inspection
    device: Device
    context: int
    fits: tuple[tuple[str, Fit], ...]


def inspect(
    model: str | Path,
    *,
    context: int = 4096,
    device: str | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Inspected:
    """What is in a model and where it fits, from headers alone; needs neither MLX nor its weights.

    ``context`` is in tokens, ``device`` a name such as ``m4-max-64gb``; by default this machine.
    Raises BadInputError where there is no such model or device.
    """
    return inspected(find_model(model, trusted=trust_remote_code, on_event=on_event), context, device)


def plan(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    requantize: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Plan:
    """Every decision and every byte that ``quantize`` would write, to the byte. Weights are read only by a budget.

    ``requantize`` reads a model that is quantized already as numbers.
    Raises RecipeError with every fault of the recipe on this model, BadInputError where it cannot be made.
    """
    from mlxq.planning.plan import Stored

    start_mlx()
    source = find_model(model, trusted=trust_remote_code, on_event=on_event)
    return planned(as_recipe(recipe), source, Stored.REQUANTIZE if requantize else Stored.AS_IS, on_event=on_event)


def quantize(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    output: str | Path | None = None,
    requantize: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Finished:
    """Make the model that ``recipe`` describes, verified, in ``output`` (by default ``./MODEL-RECIPE``).

    ``force`` replaces a model that is there. The recipe's gates are checked after; its ``upload`` is left to
    ``upload``.
    Raises BadInputError where it cannot be made as asked, MlxqError where the run fails (the same call continues it),
    GateError where the model was made and does not meet a gate.
    """
    loaded = as_recipe(recipe)
    out = _output(output, loaded, model, force=force)
    made = plan(model, loaded, requantize=requantize, trust_remote_code=trust_remote_code, on_event=on_event)
    finished = write(made, out, force=force, on_event=on_event)
    require_gates(check_recipe_gates(made, out, on_event=on_event), out)
    return finished


def convert(
    model: str | Path,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Finished:
    """Write a model for MLX without quantizing it, in ``dtype`` (``bfloat16``, ``float16``, ``float32``) or its own.

    ``dequantize`` writes what is quantized as plain numbers.
    Raises BadInputError where it cannot be made as asked, MlxqError where the run fails.
    """
    from mlxq.planning.plan import Stored

    start_mlx()
    recipe = recipe_from_dict({"dtype": dtype} if dtype else {}, "mlx")
    out = _output(output, recipe, model, force=force)
    source = find_model(model, trusted=trust_remote_code, on_event=on_event)
    made = planned(recipe, source, Stored.DEQUANTIZE if dequantize else Stored.AS_IS, on_event=on_event)
    return write(made, out, force=force, on_event=on_event)


def compare(
    reference: str | Path,
    candidates: Iterable[str | Path | Mapping[str, Any] | Recipe],
    *,
    settings: Settings | None = None,
    gates: Sequence[str] = (),
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Comparison:
    """What each candidate, a model or a recipe applied to ``reference``, costs and how far it is from it.

    ``settings`` say on which text, how many tokens, and what is timed and asked. ``gates``, such as
    ``kl_mean<0.05``, must hold for every candidate. ``on_event`` is also told the Comparison after each model.
    Raises BadInputError for models that do not compare, GateError where a gate fails.
    """
    from mlxq.comparison.measure import Settings

    start_mlx()
    parsed = [parse_gate(gate) for gate in gates]
    done = compared(reference, list(candidates), settings or Settings(), trusted=trust_remote_code, on_event=on_event)
    require_gates(gate_results(parsed, done))
    return done


def upload(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Published:
    """Publish a folder that mlxq wrote as ``repo`` (``org/name``) on the Hub, on ``revision`` or ``main``.

    Raises BadInputError where the folder is not whole or the Hub refuses, MlxqError where it cannot be reached.
    """
    start_mlx()
    target = Target(repo, private, revision)
    return published(Path(folder), target, force=force, trusted=trust_remote_code, on_event=on_event)


# The stages that the verbs and the commands are made of.


def as_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
    """A recipe by name, file or content. Raises RecipeError with all its faults."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return recipe_from_dict(dict(recipe), "recipe")
    return load_recipe(str(recipe))


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


def inspected(source: ModelSource, context: int, device: str | None) -> Inspected:
    """See ``inspect``."""
    from mlxq.architecture.estimate import estimate
    from mlxq.architecture.inspection import inspect_model
    from mlxq.machine.devices import find_device, this_machine
    from mlxq.machine.memory import fit

    machine = find_device(device) if device else this_machine()
    found = inspect_model(source, context)
    fits = []
    for recipe in shipped_recipes():
        footprint = estimate(found, recipe).footprint(found.config, context)
        fits.append((recipe.name, fit(footprint, machine)))
    return Inspected(found, machine, context, tuple(fits))


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
    from mlxq.comparison.measure import Comparison
    from mlxq.comparison.measure import compare as comparing

    done: Comparison | None = None
    for event in comparing(models[0], models[1:], settings):
        if isinstance(event, Comparison):
            done = event
            if (unwritten := _record(event, models)) is not None:
                on_event(unwritten)
        on_event(event)
    assert done is not None, "a comparison ends with its results"
    return done


def _record(comparison: Comparison, models: Sequence[Candidate]) -> Remark | None:
    """Put the newest result into the ``mlxq.json`` beside the model, where it has one; returns why that failed."""
    from mlxq.budget.scoring import Remark
    from mlxq.comparison.report import candidate_facts
    from mlxq.writing.report import FILE_NAME, read_report, write_report

    newest = models[len(comparison.results) - 1]
    if newest is models[0] or newest.folder is None or not (newest.folder / FILE_NAME).is_file():
        return None
    report = read_report(newest.folder / FILE_NAME)
    report["comparison"] = candidate_facts(comparison.results[-1], comparison)
    # A read-only folder (the Hub's cache, say) is measured all the same.
    try:
        write_report(report, newest.folder)
    except PermissionError:
        return None
    except OSError as exc:
        return Remark(f"{newest.folder / FILE_NAME} does not say what was measured: {exc.strerror}")
    return None


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


def _output(output: str | Path | None, recipe: Recipe, model: str | Path, *, force: bool) -> Path:
    """Where the model goes. Raises BadInputError where something is there, before any work is done."""
    from mlxq.pipeline import default_output

    out = Path(output or recipe.output or default_output(recipe, str(model)))
    if out.exists() and not force:
        raise BadInputError(f"{out} already exists", "Choose another output, or replace it with force.")
    return out
