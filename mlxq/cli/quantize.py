"""``mlxq quantize RECIPE``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxq.cli.options import DryRun, Force, Generate, Json, LowDisk, Output, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from mlxq.recipe.model import Recipe


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
    from mlxq.cli.fetching import fetched, telling
    from mlxq.cli.writing import show_plan, write_model
    from mlxq.errors import BadInputError, MlxqError
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    from mlxq.recipe.match import check_pattern

    _check_together(recipe, locked, sets, bpw, size, frontier, plot)
    if why is not None:
        check_pattern(why, "--why")
    spending = target = None
    if locked is not None:
        from mlxq.machine.backend import start_mlx

        start_mlx()
        from mlxq.pipeline import differing_files, prepare_locked
        from mlxq.writing.report import read_report

        recorded = read_report(locked)
        with telling() as tell:
            plan, options = prepare_locked(recorded, model, on_event=tell)
        out = output or Path(f"{locked.resolve().parent.name}-rebuilt")
    else:
        assert recipe is not None
        loaded, name = _asked(recipe, model, bpw, size, sets or ())
        if upload and not (dry_run or frontier or why is not None):
            target = loaded.upload
        if target is not None:
            from mlxq.publish.hub import check_login

            # Said now, not after hours of work.
            check_login()
        from mlxq.machine.backend import start_mlx

        start_mlx()
        from mlxq.pipeline import Options, default_output, prepare
        from mlxq.planning.plan import Stored

        recorded = None
        options = Options(Stored.REQUANTIZE if requantize else Stored.AS_IS, trust_remote_code)
        out = output or (Path(loaded.output) if loaded.output else default_output(loaded, name))
        if not (dry_run or frontier or why is not None or force) and out.exists():
            raise BadInputError(f"{out} already exists", "Choose another -o, or replace it with --force.")
        with telling() as tell:
            plan = prepare(loaded, name, options, on_event=tell)
        if low_disk:
            from mlxq.writing.low_disk import check_low_disk

            check_low_disk(plan)
        if loaded.budget is not None:
            from mlxq.cli.spending import spend_budget

            plan = fetched(plan, out, options)
            plan, spending = spend_budget(plan, options, measure_curve=frontier)
        elif frontier or explain:
            raise BadInputError(
                f"{'--frontier' if frontier else '--explain'} is about a budget, and recipe {loaded.name} has none",
                "Give one: --bpw 4.25, --size 2.2GB, or budget: in the recipe.",
            )
    if spending is not None and not console.as_json:
        from mlxq.cli.spending import show_spending

        show_spending(spending, explain=explain, frontier=frontier, plot=plot)
    if frontier:
        if console.as_json:
            console.json({"schema": "mlxq.budget", "schema_version": 1, **(plan.spending or {})})
        return
    if dry_run or why is not None:
        show_plan(
            plan,
            out=out,
            why=why,
            low_disk=low_disk,
            trust_remote_code=trust_remote_code,
        )
        return
    finished = write_model(plan, out, options, force=force, generate=generate, low_disk=low_disk)
    if recorded is not None and (differing := differing_files(finished.report, recorded)):
        theirs, ours = recorded["versions"], finished.report["versions"]
        changed = [
            f"{name} {theirs.get(name)}, here {ours.get(name)}" for name in ours if theirs.get(name) != ours[name]
        ]
        raise MlxqError(
            f"{out} differs from what {locked} records in {', '.join(differing)}",
            f"It was made with {'; '.join(changed)}." if changed else "The versions are the same: the source differs.",
        )
    if plan.recipe.gates:
        from mlxq.cli.compare import check_recipe_gates

        original = plan.source.name
        if plan.source.revision is not None:
            original = f"{original.partition('@')[0]}@{plan.source.revision}"
        check_recipe_gates(plan.recipe.gates, original, out)
    if target is not None:
        from mlxq.cli.upload import publish_made

        publish_made(out, target)


def _check_together(
    recipe: str | None,
    locked: Path | None,
    sets: list[str] | None,
    bpw: float | None,
    size: str | None,
    frontier: bool,
    plot: Path | None,
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
    if plot is not None and not frontier:
        raise BadInputError("--plot draws the curve of --frontier", "Add --frontier.")
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise BadInputError(f"cannot draw a {plot.suffix or 'file without suffix'}", "Name an .svg or a .png.")


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
