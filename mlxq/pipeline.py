"""The straight line: resolve -> bind -> plan -> execute -> verify -> report. Every command walks a prefix of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.architecture.bind import bind
from mlxq.architecture.opening import open_lazily
from mlxq.budget.scoring import Scoring
from mlxq.budget.spend import Spending, spend
from mlxq.calibration.streamed import not_sequential
from mlxq.errors import BadInputError, MlxqError, RecipeError
from mlxq.headers import read_file_header
from mlxq.machine.runtime import peak_rss_bytes
from mlxq.methods.formats import Format
from mlxq.methods.registry import uses_text
from mlxq.metrics.size import measure_size
from mlxq.planning.make import make_plan
from mlxq.planning.plan import Plan, Spent, Stored
from mlxq.publish.card import source_metadata, write_card
from mlxq.recipe.load import load_recipe, recipe_from_dict
from mlxq.recipe.model import Recipe
from mlxq.retry import Waiting
from mlxq.sources.download import Downloading, fetch, fetch_companions
from mlxq.sources.resolve import resolve
from mlxq.writing.disk_space import check_disk
from mlxq.writing.execute import Written, execute
from mlxq.writing.folder import PartialFolder
from mlxq.writing.low_disk import execute_by_shards
from mlxq.writing.report import build_report, hash_files, source_facts, write_report

if TYPE_CHECKING:
    from mlxq.sources.resolve import Event


@dataclass(frozen=True)
class Options:
    """How the weights of the source are read.

    ``stored`` says what becomes of modules that it holds quantized; ``trust_remote_code`` lets ``mlx_lm`` run a model
    file of the repository.
    """

    stored: Stored = Stored.AS_IS
    trust_remote_code: bool = False

    @classmethod
    def from_dict(cls, recorded: Mapping[str, bool]) -> Options:
        """Those that an ``mlxq.json`` records."""
        stored = next((each for each in Stored if recorded.get(each.value)), Stored.AS_IS)
        return cls(stored, recorded["trust_remote_code"])

    def as_dict(self) -> dict[str, bool]:
        """As ``mlxq.json`` records them."""
        asked = {each.value: each is self.stored for each in Stored if each is not Stored.AS_IS}
        return {**asked, "trust_remote_code": self.trust_remote_code}


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
    spent: Spent | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Plan:
    """Everything up to the plan, from headers only; ``spent`` is what the recipe's budget came to earlier.

    ``on_event`` is told what is waited for and what is fetched.
    """
    source = resolve(model, trusted=options.trust_remote_code, on_event=on_event)
    architecture = bind(source)
    reason = None
    if recipe.calibration.has_text and (recipe.budget is not None or uses_text(recipe.method)):
        reason = not_sequential(source, architecture, trust_remote_code=options.trust_remote_code)
    return make_plan(source, recipe, architecture, options.stored, spent=spent, uncalibrated=reason)


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
            options.stored,
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
    name = Path(model.partition("@")[0]).resolve().name.removesuffix(".gguf")
    return Path(f"{name}-{recipe.name}")


def with_weights(
    plan: Plan, out: Path, options: Options, *, low_disk: bool = False
) -> Generator[Downloading | Waiting, None, Plan]:
    """The same plan with its source on this disk; with ``low_disk`` all but the weights.

    Raises MlxqError where the disk has no room for source and output, or the Hub cannot be reached.
    """
    check_disk(plan, out, low_disk=low_disk, trust_remote_code=options.trust_remote_code)
    source = yield from (fetch_companions if low_disk else fetch)(plan.source)
    return plan.with_source(source)


def run(
    plan: Plan, out: Path, options: Options, *, force: bool = False, low_disk: bool = False
) -> Iterator[Written | Resumed | Downloading | Waiting | Finished]:
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
        files = hash_files(partial.folder, partial.shard_sha256())
        report = build_report(plan, size, options.as_dict(), timings, peak, files)
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
    report: dict[str, Any], model: str | None, *, on_event: Callable[[Event], None] = lambda _: None
) -> tuple[Plan, Options]:
    """The plan that an ``mlxq.json`` records, on the same source.

    Raises BadInputError where the source is no longer the one recorded.
    """
    recorded = report["source"]
    options = Options.from_dict(report["options"])
    name = model or recorded["name"]
    if model is None and recorded["revision"]:
        name = f"{recorded['name'].partition('@')[0]}@{recorded['revision']}"
    recipe = recipe_from_dict(report["recipe"]["resolved"], report["recipe"]["name"])
    spent = None
    if recipe.budget is not None:
        formats = {m["path"]: Format.from_config(m["format"]) if m["format"] else None for m in report["modules"]}
        spent = Spent(formats, report["budget"])
    plan = prepare(recipe, name, options, spent=spent, on_event=on_event)
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
