"""``mlxq inspect MODEL``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from mlxq.cli.options import Json, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource
    from mlxq.sources.soundness import Unsound


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
    context: Annotated[
        int, typer.Option("--context", min=1, max=100_000_000, help="Tokens of context to reckon memory for.")
    ] = 4096,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Reckon for this device (m4-max-64gb, mac-m4, ...) instead of this machine."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Plan this recipe on the model, exactly, and show why.")
    ] = None,
    why: Annotated[str, typer.Option("--why", help="With --recipe: only modules this pattern matches.")] = "*",
    check: Annotated[
        bool, typer.Option("--check", help="Read it all, list the tensors with NaN or infinity; exit code 1 if any.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a model and whether it fits.

    Reads headers only, no weights, except with --check.

    Example: mlxq inspect ./my-model --device mac-m4 --context 8192
    """
    from mlxq.cli.fetching import find_model
    from mlxq.errors import BadInputError
    from mlxq.recipe.match import check_pattern
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    check_pattern(why, "--why")
    if match is not None:
        check_pattern(match, "--match")
    if recipe is None and why != "*":
        raise BadInputError("--why explains what a recipe decides", "Add --recipe.")
    if recipe is not None:
        if layers or match is not None or text is not None or device is not None or check:
            raise BadInputError(
                "--recipe shows a plan, which --layers, --match, --text, --device and --check do not change",
                "Leave them out, or leave out --recipe.",
            )
        _show_plan(model, recipe, why, trusted=trust_remote_code)
        return
    from mlxq import api
    from mlxq.show import inspection_tables, verify_tables

    source = find_model(model, trusted=trust_remote_code, tokenizer=text is not None)
    unsound = _read_through(source) if check else None
    found = api.inspected(source, context, device, text)
    modules = inspection_tables.chosen_modules(found.inspection, match)
    if console.as_json:
        console.json(inspection_tables.inspection_facts(found, modules, unsound))
        _refuse(unsound, model)
        return
    console.show(inspection_tables.inspection_table(found.inspection))
    console.show(inspection_tables.module_table(modules, folded=not layers))
    if found.encoding is not None:
        console.show(inspection_tables.encoding_table(found.encoding))
    console.show(inspection_tables.fit_heading(found.device, context))
    console.show(inspection_tables.fit_table(found.fits, found.device))
    console.note(f"Sizes are estimates from the headers. To the byte: mlxq quantize RECIPE --model {model} --dry-run")
    if unsound:
        console.show(verify_tables.unsound_table(unsound))
    elif unsound is not None:
        console.show("Every number is finite.")
    _refuse(unsound, model)


def _show_plan(model: str, recipe: str, why: str, *, trusted: bool) -> None:
    """What a recipe would make of a model. Raises BadInputError where that shows only after calibration."""
    from mlxq.cli.fetching import find_model
    from mlxq.cli.writing import show_plan
    from mlxq.errors import BadInputError
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.load import load_recipe

    loaded = load_recipe(recipe)
    if loaded.budget is not None:
        raise BadInputError(
            f"what recipe {loaded.name} does with its budget shows only after calibration",
            f"mlxq quantize {recipe} --model {model} --dry-run calibrates and shows the plan.",
        )
    start_mlx()
    from mlxq.pipeline import default_output, prepare
    from mlxq.planning.plan import Stored

    plan = prepare(loaded, find_model(model, trusted=trusted), Stored.REQUANTIZE)
    show_plan(plan, out=default_output(loaded, model), why=why)


def _read_through(source: ModelSource) -> tuple[Unsound, ...]:
    """The tensors with NaN or infinity, with progress; a model on the Hub is fetched first."""
    from mlxq.cli.fetching import brought
    from mlxq.show.meters import progress
    from mlxq.sources.soundness import Unsound, read_through
    from mlxq.writing.verify import scale_codes

    source = brought(source)
    found = []
    with progress("Reading") as meter:
        for event in read_through(source, scale_codes(source)):
            if isinstance(event, Unsound):
                found.append(event)
            else:
                meter.update(event.done_bytes, event.total_bytes, event.finished)
    return tuple(found)


def _refuse(unsound: Sequence[Unsound] | None, name: str) -> None:
    """Raise MlxqError where there is an unsound tensor."""
    from mlxq.errors import MlxqError

    if unsound:
        what = "a tensor holds" if len(unsound) == 1 else f"{len(unsound):,} tensors hold"
        raise MlxqError(f"{name}: {what} NaN or infinity: {unsound[0]}", "It is damaged: fetch or convert it again.")
