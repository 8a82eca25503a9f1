"""The straight line: resolve -> bind -> plan -> execute -> verify -> report. Every command walks a prefix of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.architecture.bind import bind
from mlxq.budget.scoring import Remark, Scoring
from mlxq.budget.spend import Spending, spend
from mlxq.calibration.streamed import not_sequential
from mlxq.errors import BadInputError, RecipeError
from mlxq.machine.runtime import peak_rss_bytes
from mlxq.methods.formats import Format
from mlxq.methods.registry import uses_text
from mlxq.metrics.size import measure_size
from mlxq.planning.make import make_plan
from mlxq.planning.plan import Plan, Spent, Stored
from mlxq.publish.card import write_card
from mlxq.recipe.load import load_recipe, recipe_from_dict
from mlxq.recipe.model import Recipe
from mlxq.retry import Waiting
from mlxq.shown import Shown
from mlxq.sources.base import ModelSource
from mlxq.sources.download import Downloading, fetch, fetch_companions
from mlxq.sources.gguf_parts import model_name
from mlxq.sources.unchanged import check_unchanged
from mlxq.writing.disk_space import check_disk
from mlxq.writing.execute import Written, execute
from mlxq.writing.folder import PartialFolder
from mlxq.writing.low_disk import execute_by_shards
from mlxq.writing.report import build_report, check_trust, hash_files, source_facts, write_report
from mlxq.writing.standing import check_output
from mlxq.writing.verify import check_companions, check_written


@dataclass(frozen=True)
class Resumed:
    """An interrupted run was found: ``step_count`` parameters were finished, or it was ``discarded``, in words."""

    step_count: int
    discarded: str | None
    folder: Path


@dataclass(frozen=True)
class Finished(Shown):
    """The output stands under its name; ``report`` is what its ``mlxq.json`` holds."""

    out: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Allocated:
    """A plan whose budget is spent, and how."""

    plan: Plan
    spending: Spending


def prepare(recipe: Recipe, source: ModelSource, stored: Stored = Stored.AS_IS, *, spent: Spent | None = None) -> Plan:
    """Everything from the source to the plan, from headers only.

    ``stored`` says what becomes of modules that the source holds quantized, ``spent`` what the recipe's budget came to
    earlier.
    """
    architecture = bind(source)
    reason = None
    if recipe.calibration.has_text and (recipe.budget is not None or uses_text(recipe.method)):
        reason = not_sequential(source)
    return make_plan(source, recipe, architecture, stored, spent=spent, uncalibrated=reason)


def allocated_plan(draft: Plan, *, measure_curve: bool = False) -> Iterator[Scoring | Remark | Allocated]:
    """Spend the budget of ``draft``: progress, then the plan with every format chosen.

    Raises BadInputError where the budget is too small, or the tokenizer does not fit the weights.
    """
    check_companions(draft)
    for event in spend(draft, _presets(draft), measure_curve=measure_curve):
        if isinstance(event, Scoring | Remark):
            yield event
            continue
        plan = make_plan(
            draft.source,
            draft.recipe,
            draft.architecture,
            draft.stored,
            spent=Spent(event.allocation.formats, event.facts()),
            uncalibrated=draft.uncalibrated,
        )
        yield Allocated(plan, event)


def _presets(draft: Plan) -> dict[str, dict[str, Format | None]]:
    """The shipped mixed recipes on this model, as assignments that a budget has to beat."""
    found = {}
    for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"):
        with contextlib.suppress(RecipeError):  # made for models with down_proj and the like; others have none
            plan = make_plan(draft.source, load_recipe(name), draft.architecture)
            found[name] = {decision.path: decision.format for decision in plan.decisions}
    return found


def default_output(recipe: Recipe, model: str) -> Path:
    """``./<model>-<recipe>``, where neither the recipe nor the command line names a folder."""
    name = model_name(Path(model.partition("@")[0]).resolve().name)
    return Path(f"{name}-{recipe.name}")


def with_weights(plan: Plan, out: Path, *, low_disk: bool = False) -> Generator[Downloading | Waiting, None, Plan]:
    """The same plan with its source on this disk; with ``low_disk`` all but the weights.

    Raises MlxqError where the disk has no room for source and output, or the Hub cannot be reached.
    """
    check_disk(plan, out, low_disk=low_disk)
    source = yield from (fetch_companions if low_disk else fetch)(plan.source)
    return plan.with_source(source)


def run(
    plan: Plan, out: Path, *, force: bool = False, low_disk: bool = False
) -> Generator[Written | Resumed | Downloading | Waiting | Remark | Finished, None, None]:
    """Write ``plan`` to ``out``, yielding progress; the last event is ``Finished``.

    What is still on the Hub is fetched first, or with ``low_disk`` shard by shard as it is needed.

    Raises BadInputError where ``out`` exists and ``force`` is not given, or what travels along does not fit the
    weights (``check_companions``); MlxqError where the run fails, or what it wrote is not whole. What is finished by
    then stays in ``out.partial``, and the same call continues from it.
    """
    began = time.perf_counter()
    check_output(plan.source, out, force=force)
    plan = yield from with_weights(plan, out, low_disk=low_disk)
    if remark := check_companions(plan):
        yield Remark(remark)
    with PartialFolder(plan, out, force=force) as partial:
        if partial.found.done or partial.found.discarded:
            yield Resumed(len(partial.found.done), partial.found.discarded, partial.place)
        write = execute if plan.source.remote is None else execute_by_shards
        yield from write(plan, partial)
        executed = time.perf_counter()
        peak = peak_rss_bytes()
        partial.write_sidecars()
        check_written(plan, partial.folder)
        verified = time.perf_counter()
        timings = {"execute": executed - began, "verify": verified - executed}
        size = measure_size(partial.folder)
        files = hash_files(partial.folder, partial.shard_sha256())
        report = build_report(plan, size, timings, peak, files)
        report["notes"] += [remark] if remark else []
        report["card"] = dict(plan.source.card.values)
        write_card(report, partial.folder, out.name)
        write_report(report, partial.folder)
        check_unchanged(plan.source)
        partial.publish()
    yield Finished(out, report)


def recorded_model(report: Mapping[str, Any]) -> str:
    """The model that an ``mlxq.json`` records, as ``resolve`` takes it.

    Raises BadInputError where that was a folder or file whose place it does not say.
    """
    recorded = report["source"]
    if recorded["revision"]:
        return f"{recorded['name'].partition('@')[0]}@{recorded['revision']}"
    name = str(recorded["name"])
    if name != "sample" and not Path(name).exists():
        raise BadInputError(
            f"the report says that the model is called {name}, and not where it lies", f"Name it: --model .../{name}"
        )
    return name


def prepare_locked(report: Mapping[str, Any], source: ModelSource) -> Plan:
    """The plan that an ``mlxq.json`` records, on the same source.

    Raises BadInputError where ``source`` is no longer the one recorded, or is not trusted as that one was.
    """
    check_trust(report, "what it records", trusted=source.trusted)
    recipe = recipe_from_dict(report["recipe"]["resolved"], report["recipe"]["name"])
    if uses_text(recipe.method):
        _check_texts(recipe)
    spent = None
    if recipe.budget is not None:
        formats = {m["path"]: Format.from_config(m["format"]) if m["format"] else None for m in report["modules"]}
        spent = Spent(formats, report["budget"])
    plan = prepare(recipe, source, Stored.recorded(report["options"]), spent=spent)
    recorded = report["source"]
    if source_facts(source)["headers_sha256"] != recorded["headers_sha256"]:
        raise BadInputError(
            f"{source.name} is not the model that was quantized: its tensors differ",
            f"Name the original with --model ({recorded['name']}, revision {recorded['revision'] or 'unknown'}).",
        )
    return plan


def _check_texts(recipe: Recipe) -> None:
    """Raise BadInputError where a text file that a report names is not here: a report says no places."""
    for text in recipe.calibration.texts:
        if text not in ("builtin", "self", "none") and not Path(text).is_file():
            raise BadInputError(
                f"the calibration text {text} is not here, and a report does not say where it lies",
                f"Run the command in the folder that holds {Path(text).name}.",
            )


def compared_files(report: Mapping[str, Any], locked: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files of a rebuilt folder whose bytes are those recorded, and those that differ.

    The card is not compared: it carries the folder's name.
    """
    recorded = {name: facts["sha256"] for name, facts in locked["files"].items() if name != "README.md"}
    same = tuple(n for n, digest in recorded.items() if report["files"].get(n, {}).get("sha256") == digest)
    return same, tuple(name for name in recorded if name not in same)
