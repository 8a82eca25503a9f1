"""The straight line: resolve -> bind -> plan -> execute -> verify -> report. Every command walks a prefix of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxq.architecture.bind import bind, open_lazily
from mlxq.budget.spend import Scoring, Spending, spend
from mlxq.calibration.streamed import not_sequential
from mlxq.errors import BadInputError, MlxqError, RecipeError
from mlxq.machine.runtime import peak_rss_bytes
from mlxq.methods.formats import Format
from mlxq.metrics.size import measure_size
from mlxq.planning.plan import BY_BUDGET, Plan, make_plan
from mlxq.publish.card import source_metadata, write_card
from mlxq.recipe.load import Calibration, Recipe, load_recipe, recipe_from_dict
from mlxq.retry import Waiting
from mlxq.sources.download import Downloading, fetch, fetch_companions
from mlxq.sources.resolve import resolve
from mlxq.sources.safetensors import read_file_header
from mlxq.writing.disk_space import check_room
from mlxq.writing.execute import Progress, execute
from mlxq.writing.folder import PartialFolder
from mlxq.writing.low_disk import execute_by_shards
from mlxq.writing.report import build_report, source_facts, write_report


@dataclass(frozen=True)
class Options:
    """How the weights of the source are read.

    ``requantize`` reads already quantized modules as numbers; ``dequantize`` writes them so; ``keep_quantization``
    carries GGUF blocks over exactly; ``trust_remote_code`` lets ``mlx_lm`` run a model file of the repository.
    """

    requantize: bool = False
    dequantize: bool = False
    keep_quantization: bool = False
    trust_remote_code: bool = False

    def as_dict(self) -> dict[str, bool]:
        """As ``mlxq.json`` records them."""
        return {
            "requantize": self.requantize,
            "dequantize": self.dequantize,
            "keep_quantization": self.keep_quantization,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass(frozen=True)
class Resumed:
    """An interrupted run was found: ``step_count`` parameters were finished, or it was of another plan."""

    step_count: int
    discarded: bool
    folder: Path


@dataclass(frozen=True)
class Finished:
    """The output stands under its name; ``report`` is what its ``mlxq.json`` holds."""

    out: Path
    report: dict[str, Any]


@dataclass(frozen=True)
class Allocated:
    """A plan whose budget is spent, and how."""

    plan: Plan
    spending: Spending


def prepare(
    recipe: Recipe,
    model: str,
    options: Options,
    *,
    allocated: Mapping[str, Format | None] | None = None,
    on_wait: Callable[[Waiting], None] = lambda _: None,
) -> Plan:
    """Everything up to the plan, from headers only; ``allocated`` are formats that a budget came to earlier.

    ``on_wait`` is told when the Hub lets one wait.
    """
    source = resolve(model, trusted=options.trust_remote_code, on_wait=on_wait)
    architecture = bind(source, trust_remote_code=options.trust_remote_code)
    remarks: tuple[str, ...] = ()
    if recipe.method != "rtn" and recipe.calibration.has_text:
        reason = not_sequential(source, architecture, trust_remote_code=options.trust_remote_code)
        if reason is not None:
            recipe = replace(recipe, calibration=Calibration(("none",)))
            remarks = (f"calibration cannot follow this model ({reason}), so weights alone decide",)
    return make_plan(
        source,
        recipe,
        architecture,
        requantize=options.requantize,
        dequantize=options.dequantize,
        keep_quantization=options.keep_quantization,
        allocated=allocated,
        remarks=remarks,
    )


def allocated_plan(draft: Plan, options: Options, *, measure_curve: bool = False) -> Iterator[Scoring | Allocated]:
    """Spend the budget of ``draft``: progress, then the plan with every format chosen.

    Raises BadInputError where the budget is too small.
    """
    for event in spend(
        draft, _presets(draft), measure_curve=measure_curve, trust_remote_code=options.trust_remote_code
    ):
        if isinstance(event, Scoring):
            yield event
            continue
        plan = make_plan(
            draft.source,
            draft.recipe,
            draft.architecture,
            requantize=options.requantize,
            allocated=event.allocation.formats,
            remarks=draft.remarks,
        )
        yield Allocated(replace(plan, spending=event.facts()), event)


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
    name = Path(model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    return Path(f"{name}-{recipe.name}")


def with_weights(
    plan: Plan, out: Path, options: Options, *, low_disk: bool = False
) -> Generator[Downloading | Waiting, None, Plan]:
    """The same plan with its source on this disk; with ``low_disk`` all but the weights.

    Raises MlxqError where the disk has no room for source and output, or the Hub cannot be reached.
    """
    check_room(plan, out, low_disk=low_disk, trust_remote_code=options.trust_remote_code)
    source = yield from (fetch_companions if low_disk else fetch)(plan.source)
    return replace(plan, source=source)


def run(
    plan: Plan, out: Path, options: Options, *, force: bool = False, low_disk: bool = False
) -> Iterator[Progress | Resumed | Downloading | Waiting | Finished]:
    """Write ``plan`` to ``out``, yielding progress; the last event is ``Finished``.

    What is still on the Hub is fetched first, or with ``low_disk`` shard by shard as it is needed.

    Raises BadInputError where ``out`` exists and ``force`` is not given, MlxqError where the run fails; what is
    finished by then stays in ``out.partial`` and the same call continues from it.
    """
    began = time.perf_counter()
    check_output(plan, out, force=force)
    plan = yield from with_weights(plan, out, options, low_disk=low_disk)
    with PartialFolder(plan, out, force=force) as partial:
        if partial.found.done or partial.found.discarded:
            yield Resumed(len(partial.found.done), partial.found.discarded, partial.folder)
        write = execute if plan.source.remote is None else execute_by_shards
        yield from write(plan, partial, trust_remote_code=options.trust_remote_code)
        executed = time.perf_counter()
        peak = peak_rss_bytes()
        partial.write_sidecars()
        verify(plan, partial.folder, trust_remote_code=options.trust_remote_code)
        verified = time.perf_counter()
        timings = {"execute": executed - began, "verify": verified - executed}
        size = measure_size(partial.folder)
        report = build_report(plan, size, options.as_dict(), timings, peak, partial.folder)
        report["card"] = source_metadata(plan.source)
        write_card(report, partial.folder, out.name)
        write_report(report, partial.folder)
        partial.publish()
    yield Finished(out, report)


def check_output(plan: Plan, out: Path, *, force: bool) -> None:
    """Raise BadInputError for an ``out`` that cannot be made, or whose replacement would take other things with it."""
    if out.name in ("", ".."):
        raise BadInputError(f"{out} is no name for a new folder", "Give it one: -o NAME.")
    target = out.resolve()
    files = [] if plan.source.remote else plan.source.weight_files
    if any(target in (path, *path.parents) for file in files for path in (file.absolute(), file.resolve())):
        raise BadInputError(f"{out} holds the model that it would be made from", "Choose another -o.")
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise BadInputError(f"{out} already exists", "Choose another -o, or replace it with --force.")
    if out.is_symlink():
        raise BadInputError(f"{out} is a link, and --force replaces only a folder", f"Name the folder: -o {target}.")
    if not out.is_dir() or not ((out / "config.json").is_file() or not any(out.iterdir())):
        raise BadInputError(
            f"{out} is not a model folder, and --force replaces nothing else", "Remove it, or choose another -o."
        )


def verify(plan: Plan, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check a written folder against its plan: headers, sizes, and that ``mlx_lm`` takes it.

    Raises MlxqError at the first difference.
    """
    planned = {spec.name: spec for step in plan.steps for spec in step.outputs}
    found = {}
    for shard in plan.shards:
        file = folder / shard.file
        if file.stat().st_size != shard.nbytes:
            raise MlxqError(f"{file} has {file.stat().st_size:,} bytes where {shard.nbytes:,} were planned")
        found.update({tensor.spec.name: tensor.spec for tensor in read_file_header(file)})
    if found != planned:
        wrong = sorted(set(found.items()) ^ set(planned.items()), key=lambda item: item[0])[0][0]
        raise MlxqError(f"{folder}: tensor {wrong} is not what was planned")
    try:
        open_lazily(folder, str(folder), trust_remote_code=trust_remote_code)
    except BadInputError as exc:
        raise MlxqError(f"the output does not load: {exc.message}", f"It is kept in {folder} for a look.") from exc


def prepare_locked(
    report: dict[str, Any], model: str | None, *, on_wait: Callable[[Waiting], None] = lambda _: None
) -> tuple[Plan, Options]:
    """The plan that an ``mlxq.json`` records, on the same source.

    Raises BadInputError where the source is no longer the one recorded.
    """
    recorded = report["source"]
    options = Options(**report["options"])
    name = model or recorded["name"]
    if model is None and recorded["revision"]:
        name = f"{recorded['name'].partition('@')[0]}@{recorded['revision']}"
    allocated = {
        module["path"]: Format(**module["format"]) if module["format"] else None
        for module in report["modules"]
        if module["decided_by"] == BY_BUDGET
    }
    recipe = recipe_from_dict(report["recipe"]["resolved"], report["recipe"]["name"])
    plan = replace(prepare(recipe, name, options, allocated=allocated, on_wait=on_wait), spending=report.get("budget"))
    now = source_facts(plan.source)
    if now["headers_sha256"] != recorded["headers_sha256"]:
        raise BadInputError(
            f"{name} is not the model that was quantized: its tensors differ",
            f"Name the original with --model ({recorded['name']}, revision {recorded['revision'] or 'unknown'}).",
        )
    return plan, options


def differing_files(report: dict[str, Any], locked: dict[str, Any]) -> tuple[str, ...]:
    """Files of a rebuilt folder whose bytes differ from those recorded; the card carries the folder's name."""
    skipped = {"README.md"}
    return tuple(
        name
        for name, facts in locked["files"].items()
        if name not in skipped and report["files"].get(name, {}).get("sha256") != facts["sha256"]
    )
