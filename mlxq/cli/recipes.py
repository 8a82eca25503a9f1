"""``mlxq recipes``: list, show, check, schema, from-gguf."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from mlxq.cli.options import Json

app = typer.Typer(help="List, show and check recipes.", invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def listing(context: typer.Context, as_json: Json = False) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is not None:
        return
    from mlxq.recipe.load import shipped_recipes
    from mlxq.show.console import console
    from mlxq.show.tables import recipes_table

    console.use(as_json=as_json)
    found = shipped_recipes()
    if console.as_json:
        entries = [{"name": r.name, "description": r.description, "recipe": r.resolved()} for r in found]
        console.json({"schema": "mlxq.recipes", "schema_version": 1, "recipes": entries})
    else:
        console.show(recipes_table(found))
        console.note("mlxq recipes show NAME prints one; mlxq quantize NAME --model MODEL uses it.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a file.")], as_json: Json = False
) -> None:
    """Print a recipe as it was written."""
    from mlxq.recipe.load import load_recipe
    from mlxq.show.console import console

    console.use(as_json=as_json)
    recipe = load_recipe(name)
    if console.as_json:
        entry = {"name": recipe.name, "description": recipe.description, "recipe": recipe.resolved()}
        console.json({"schema": "mlxq.recipes", "schema_version": 1, "recipes": [entry]})
    else:
        sys.stdout.write(recipe.text)


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Also check every rule against this model.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Change a value first. Repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Check a recipe; all faults are listed at once."""
    from mlxq.errors import RecipeError
    from mlxq.recipe.load import load_recipe
    from mlxq.show.console import console

    console.use(as_json=as_json)
    facts: dict[str, Any] = {"schema": "mlxq.recipe-check", "schema_version": 1, "recipe": file, "faults": []}
    try:
        recipe = load_recipe(file, sets or ())
        if model is not None:
            from mlxq.machine.backend import start_mlx

            start_mlx()
            from mlxq.cli.fetching import find_model
            from mlxq.pipeline import prepare
            from mlxq.planning.plan import Stored

            plan = prepare(recipe, find_model(model), Stored.REQUANTIZE)
            facts["model"] = model
            if recipe.budget is None:
                facts |= {"file_bytes": plan.file_bytes, "bits_per_weight": plan.bits_per_weight}
    except RecipeError as error:
        if console.as_json:
            console.json({**facts, "faults": list(error.faults)})
        raise
    if console.as_json:
        console.json(facts)
    elif model is None:
        console.show(f"{file}: no faults. --model MODEL also checks that its rules mean something on a model.")
    elif "file_bytes" not in facts:
        console.show(f"{file}: no faults; on {model} its budget decides after calibration.")
    else:
        size = f"{facts['file_bytes']:,} bytes, {facts['bits_per_weight']:.3f} bits per weight"
        console.show(f"{file}: no faults; on {model} it gives {size}.")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors (docs/recipes.md says how)."""
    from mlxq.recipe.schema import json_schema
    from mlxq.show.console import console

    console.json(json_schema())


@app.command("from-gguf")
def from_gguf(
    model: Annotated[str, typer.Argument(help="A .gguf file, here or on the Hub (org/name/FILE.gguf), or 'sample'.")],
) -> None:
    """Print a recipe with the bit widths that a GGUF file gives each tensor."""
    from mlxq.cli.fetching import find_model
    from mlxq.errors import BadInputError
    from mlxq.show.console import console

    own = find_model(model).own_recipe
    if own is None:
        raise BadInputError(f"{model} is not GGUF, so it has no bit map to follow", "Name a .gguf file.")
    console.text(own)
