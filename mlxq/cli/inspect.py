"""``mlxq inspect MODEL``."""

from __future__ import annotations

from typing import Annotated

import typer

from mlxq.cli.options import Json, Quiet, TrustRemoteCode


def command(
    model: Annotated[str, typer.Argument(help="Folder, Hub id[@revision], .gguf file, or 'sample'.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row per module instead of folding the layers.")] = False,
    match: Annotated[
        str | None, typer.Option("--match", help="Only modules this pattern matches.", show_default=False)
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", help="Show how the tokenizer encodes this text.", show_default=False),
    ] = None,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of context to reckon memory for.")] = 4096,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Reckon for this device (m4-max-64gb, mac-m4, ...) instead of this machine."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Plan this recipe on the model, exactly, and show why.")
    ] = None,
    why: Annotated[str, typer.Option("--why", help="With --recipe: only modules this pattern matches.")] = "*",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model and whether it fits.

    Reads headers only, no weights.

    Example: mlxq inspect ./my-model --device mac-m4 --context 8192
    """
    from mlxq.cli.fetching import telling
    from mlxq.errors import BadInputError
    from mlxq.recipe.match import check_pattern
    from mlxq.show.console import console
    from mlxq.sources.resolve import resolve

    console.use(quiet=quiet, as_json=as_json)
    check_pattern(why, "--why")
    if match is not None:
        check_pattern(match, "--match")
    if recipe is None and why != "*":
        raise BadInputError("--why explains what a recipe decides", "Add --recipe.")
    if recipe is not None:
        if layers or match is not None or text is not None or device is not None:
            raise BadInputError(
                "--recipe shows a plan, which --layers, --match, --text and --device do not change",
                "Leave them out, or leave out --recipe.",
            )
        from mlxq.cli.writing import show_plan
        from mlxq.machine.backend import start_mlx
        from mlxq.recipe.load import load_recipe

        loaded = load_recipe(recipe)
        if loaded.budget is not None:
            raise BadInputError(
                f"what recipe {loaded.name} does with its budget shows only after calibration",
                f"mlxq quantize {recipe} --model {model} --dry-run calibrates and shows the plan.",
            )
        start_mlx()
        from mlxq.pipeline import Options, default_output, prepare
        from mlxq.planning.plan import Stored

        options = Options(Stored.REQUANTIZE, trust_remote_code)
        with telling() as tell:
            plan = prepare(loaded, model, options, on_event=tell)
        show_plan(plan, out=default_output(loaded, model), why=why)
        return
    from mlxq.architecture.estimate import estimate
    from mlxq.architecture.inspection import inspect_model
    from mlxq.architecture.tokenizer import encode_text
    from mlxq.machine.devices import find_device, this_machine
    from mlxq.machine.memory import fit
    from mlxq.recipe.load import shipped_recipes
    from mlxq.show import inspection_tables

    with telling() as tell:
        source = resolve(model, tokenizer=text is not None, trusted=trust_remote_code, on_event=tell)
    machine = find_device(device) if device else this_machine()
    found = inspect_model(source, context)
    encoding = encode_text(source, text) if text is not None else None
    modules = inspection_tables.chosen_modules(found, match)
    fits = []
    for shipped in shipped_recipes():
        guess = estimate(found, shipped)
        fits.append((shipped.name, fit(guess.footprint(found.config, context), machine)))
    if console.as_json:
        console.json(inspection_tables.inspection_facts(found, modules, machine, fits, encoding))
        return
    console.show(inspection_tables.inspection_table(found))
    console.show(inspection_tables.module_table(modules, folded=not layers))
    if encoding is not None:
        console.show(inspection_tables.encoding_table(encoding))
    console.show(inspection_tables.fit_heading(machine, context))
    console.show(inspection_tables.fit_table(fits, machine))
    console.note(f"Sizes are estimates from the headers. To the byte: mlxq quantize RECIPE --model {model} --dry-run")
