"""``mlxq quantize RECIPE``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxq.cli.options import DryRun, Force, Generate, Json, LowDisk, Output, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from mlxq.budget.spend import Spending
    from mlxq.pipeline import Finished
    from mlxq.planning.plan import Plan
    from mlxq.recipe.model import Recipe
    from mlxq.recipe.target import Target


def command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe file, or the name of a shipped recipe (see: mlxq recipes); with --bpw or --size, a model.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder, Hub id[@revision], .gguf file, or 'sample'; wins over the recipe's.",
        ),
    ] = None,
    output: Output = None,
    bpw: Annotated[
        float | None,
        typer.Option("--bpw", help="Budget in bits per weight: formats are chosen to lose least.", show_default=False),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Budget for the weight files, such as 2.2GB.", show_default=False),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Show the best at every size, a few of them measured; write no model.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="With --frontier: draw the curve to this .svg or .png.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show where a budget's bits went, and what more room would buy.")
    ] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value of the recipe, such as default.bits=3. Repeatable."),
    ] = None,
    dry_run: DryRun = False,
    why: Annotated[
        str | None,
        typer.Option("--why", help="Say for each module this pattern matches which rule decided, and why."),
    ] = None,
    locked: Annotated[
        Path | None,
        typer.Option("--locked", help="Rebuild exactly what this mlxq.json records, and check the bytes."),
    ] = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Accept a model already quantized: read it as numbers first.")
    ] = False,
    low_disk: LowDisk = False,
    force: Force = False,
    generate: Generate = True,
    upload: Annotated[
        bool, typer.Option("--upload/--no-upload", help="Publish the result where the recipe says so.")
    ] = True,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a model by a recipe.

    Plans, streams, verifies, and shows what it cost. The same command continues an interrupted run.

    Example: mlxq quantize 4bit --model ./my-model -o ./my-model-4bit

    Example: mlxq quantize ./my-model --bpw 4.25
    """
    from mlxq import api
    from mlxq.cli.writing import show_plan, write_model
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.match import check_pattern
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    _check_together(recipe, locked, sets, bpw, size, frontier)
    _check_plot(plot, frontier=frontier)
    if why is not None:
        check_pattern(why, "--why")
    writes = not (dry_run or frontier or why is not None)
    if locked is not None:
        job = _rebuilt(locked, model, output, trusted=trust_remote_code)
    else:
        assert recipe is not None
        loaded, name = _asked(recipe, model, bpw, size, sets or ())
        _check_curve(loaded, frontier=frontier, explain=explain)
        target = _login(loaded) if upload and writes else None
        start_mlx()
        out = api.output_folder(output, loaded, name, free=writes and not force)
        draft = _draft(loaded, name, requantize=requantize, low_disk=low_disk, trusted=trust_remote_code)
        job = _spent(_Job(draft, out, target), measure_curve=frontier)
    if job.spending is not None and not console.as_json:
        from mlxq.cli.spending import show_spending

        show_spending(job.spending, explain=explain, frontier=frontier, plot=plot)
    if frontier and console.as_json:
        console.json({"schema": "mlxq.budget", "schema_version": 1, **(job.plan.spending or {})})
    elif not writes and not frontier:
        show_plan(job.plan, out=job.out, why=why, low_disk=low_disk)
    if writes:
        finished = write_model(job.plan, job.out, force=force, generate=generate, low_disk=low_disk)
        _finish(job, finished)


@dataclass(frozen=True)
class _Job:
    """What the command line comes to: the plan, where it goes, and what is to be done or held against it after."""

    plan: Plan
    out: Path
    target: Target | None = None
    spending: Spending | None = None
    locked: Path | None = None
    recorded: dict[str, Any] | None = None


def _rebuilt(locked: Path, model: str | None, output: Path | None, *, trusted: bool) -> _Job:
    """The job that an ``mlxq.json`` records."""
    from mlxq.machine.backend import start_mlx

    start_mlx()
    from mlxq.cli.fetching import find_model
    from mlxq.pipeline import prepare_locked, recorded_model
    from mlxq.writing.report import check_trust, read_report

    recorded = read_report(locked)
    check_trust(recorded, str(locked), trusted=trusted)
    plan = prepare_locked(recorded, find_model(model or recorded_model(recorded), trusted=trusted))
    out = output or Path(f"{locked.resolve().parent.name}-rebuilt")
    return _Job(plan, out, locked=locked, recorded=recorded)


def _check_curve(recipe: Recipe, *, frontier: bool, explain: bool) -> None:
    from mlxq.errors import BadInputError

    if recipe.budget is None and (frontier or explain):
        raise BadInputError(
            f"{'--frontier' if frontier else '--explain'} is about a budget, and recipe {recipe.name} has none",
            "Give one: --bpw 4.25, --size 2.2GB, or budget: in the recipe.",
        )


def _login(recipe: Recipe) -> Target | None:
    """Where the result is published; a login that is missing is said now, not after hours of work."""
    from mlxq.publish.hub import check_login

    if recipe.upload is not None:
        check_login()
    return recipe.upload


def _draft(recipe: Recipe, model: str, *, requantize: bool, low_disk: bool, trusted: bool) -> Plan:
    """The plan as far as headers alone decide it."""
    from mlxq.cli.fetching import find_model
    from mlxq.pipeline import prepare
    from mlxq.planning.plan import Stored
    from mlxq.writing.low_disk import check_low_disk

    stored = Stored.REQUANTIZE if requantize else Stored.AS_IS
    plan = prepare(recipe, find_model(model, trusted=trusted), stored)
    if low_disk:
        check_low_disk(plan)
    return plan


def _spent(job: _Job, *, measure_curve: bool) -> _Job:
    """The job with its budget spent, where its recipe has one."""
    if job.plan.recipe.budget is None:
        return job
    from mlxq.cli.spending import spend_budget

    plan, spending = spend_budget(job.plan, job.out, measure_curve=measure_curve)
    return replace(job, plan=plan, spending=spending)


def _finish(job: _Job, finished: Finished) -> None:
    """Hold what was made against what was recorded and against the gates, then publish it."""
    from mlxq.cli.compare import check_gates_of

    if job.recorded is not None:
        assert job.locked is not None
        _compare_rebuilt(finished, job.recorded, job.locked)
    check_gates_of(job.plan, job.out)
    if job.target is not None:
        from mlxq.cli.upload import publish_made

        publish_made(job.out, job.target, trusted=job.plan.source.trusted)


def _compare_rebuilt(finished: Finished, recorded: Mapping[str, Any], locked: Path) -> None:
    """Say that a rebuilt folder holds the bytes that ``locked`` records. Raises MlxqError where it does not."""
    from mlxq.errors import MlxqError
    from mlxq.pipeline import compared_files
    from mlxq.show.console import console

    same, differing = compared_files(finished.report, recorded)
    if not differing:
        console.note(f"rebuilt: {len(same)} files, byte for byte as recorded in {locked}")
        return
    theirs, ours = recorded["versions"], finished.report["versions"]
    changed = [f"{name} {theirs.get(name)}, here {ours.get(name)}" for name in ours if theirs.get(name) != ours[name]]
    raise MlxqError(
        f"{finished.out} differs from what {locked} records in {', '.join(differing)}",
        f"It was made with {'; '.join(changed)}." if changed else "The versions are the same: the source differs.",
    )


def _check_together(
    recipe: str | None,
    locked: Path | None,
    sets: list[str] | None,
    bpw: float | None,
    size: str | None,
    frontier: bool,
) -> None:
    """Raise BadInputError for options that contradict each other."""
    from mlxq.errors import BadInputError

    if recipe is None and locked is None:
        raise BadInputError("name a recipe, or --locked with an mlxq.json", "mlxq recipes lists the shipped recipes.")
    if recipe is not None and locked is not None:
        raise BadInputError("--locked rebuilds what was recorded, so it takes no recipe")
    if locked is not None and (sets or bpw is not None or size is not None or frontier):
        raise BadInputError("--locked rebuilds what was recorded, so it takes no --set and no budget")
    if bpw is not None and size is not None:
        raise BadInputError("--bpw and --size are two budgets", "Give the one that binds.")


def _check_plot(plot: Path | None, *, frontier: bool) -> None:
    """Raise BadInputError for a picture that cannot be drawn, or not be written where it is to go."""
    from mlxq.errors import BadInputError
    from mlxq.files import check_writable

    if plot is not None and not frontier:
        raise BadInputError("--plot draws the curve of --frontier", "Add --frontier.")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise BadInputError(f"cannot draw a {plot.suffix or 'file without suffix'}", "Name an .svg or a .png.")
    if plot is not None:
        check_writable(plot)


def _asked(
    text: str, model: str | None, bpw: float | None, size: str | None, sets: Sequence[str]
) -> tuple[Recipe, str]:
    """The recipe and the model that the command line comes to."""
    from mlxq.errors import BadInputError
    from mlxq.recipe.load import budget_recipe, load_recipe, names_recipe

    budget = {"bpw": bpw} if bpw is not None else {"size": size}
    if bpw is None and size is None:
        recipe = load_recipe(text, sets)
    elif names_recipe(text):
        recipe = load_recipe(text, sets, budget)
    else:
        if model is not None:
            raise BadInputError(
                f"two models: {text} and --model {model}", "With --bpw or --size alone, name the model once."
            )
        return budget_recipe(budget, sets), text
    name = model or recipe.model
    if name is None:
        raise BadInputError(
            f"recipe {recipe.name} names no model", f"Add one: mlxq quantize {text} --model FOLDER-OR-HUB-ID"
        )
    return recipe, name
