"""``mlxq quantize RECIPE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlxq.cli.options import DryRun, Force, Generate, Json, Output, Quiet, TrustRemoteCode


def command(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe file, or the name of a shipped recipe (see: mlxq recipes).", show_default=False),
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
    """
    from mlxq.cli.writing import show_plan, write_model
    from mlxq.errors import BadInputError, MlxqError
    from mlxq.recipe import load_recipe

    if (recipe is None) == (locked is None):
        raise BadInputError("name a recipe, or --locked with an mlxq.json", "mlxq recipes lists the shipped recipes.")
    if locked is not None:
        if sets:
            raise BadInputError("--locked rebuilds what was recorded, so it takes no --set")
        from mlxq.pipeline import differing_files, prepare_locked
        from mlxq.report import read_report

        recorded = read_report(locked)
        plan, options = prepare_locked(recorded, model)
        out = output or Path(f"{locked.resolve().parent.name}-rebuilt")
    else:
        assert recipe is not None
        loaded = load_recipe(recipe, sets or ())
        from mlxq.runtime import load_blas

        load_blas()
        from mlxq.pipeline import Options, default_output, prepare

        name = model or loaded.model
        if name is None:
            raise BadInputError(
                f"recipe {loaded.name} names no model",
                f"Add one: mlxq quantize {recipe} --model FOLDER-OR-HUB-ID",
            )
        recorded = None
        options = Options(requantize=requantize, trust_remote_code=trust_remote_code)
        out = output or (Path(loaded.output) if loaded.output else default_output(loaded, name))
        if not dry_run and why is None and out.exists() and not force:
            raise BadInputError(f"{out} already exists", "Choose another -o, or replace it with --force.")
        plan = prepare(loaded, name, options)
    if dry_run or why is not None:
        show_plan(plan, out=out, why=why, as_json=as_json, quiet=quiet)
        return
    target = plan.recipe.upload if upload else None
    if target is not None:
        from mlxq.publish import check_login

        check_login()
    finished = write_model(plan, out, options, force=force, generate=generate, as_json=as_json, quiet=quiet)
    if plan.recipe.gates:
        from mlxq.cli.compare import check_recipe_gates

        check_recipe_gates(plan.recipe.gates, plan.source.name, out, quiet=quiet)
    if recorded is not None and (differing := differing_files(finished.report, recorded)):
        raise MlxqError(
            f"{out} differs from what {locked} records in {', '.join(differing)}",
            f"It was made with {recorded['versions']}; here are {finished.report['versions']}.",
        )
    if target is not None:
        from mlxq.cli.upload import publish_made

        publish_made(out, target, quiet=quiet)
