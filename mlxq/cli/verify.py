"""``mlxq verify OUT``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxq.cli.options import Json, Quiet, TrustRemoteCode

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource
    from mlxq.writing.fidelity import TensorError
    from mlxq.writing.verify import Check


def command(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A model folder, of mlxq or not.")],
    source: Annotated[
        str | None,
        typer.Option("--source", help="The model it was made from: hold each tensor against it.", show_default=False),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prove that a model folder is whole.

    Files against the hashes of its mlxq.json, config and index against what loaders rely on, names and shapes against
    the model, every number for NaN and infinity, the tokenizer and its chat template in a process of their own; with
    --source, each tensor's error against what its format allows. Exit code 1 where anything is wrong.

    Example: mlxq verify ./my-model-4bit --source ./my-model
    """
    from mlxq.cli.fetching import brought, find_model
    from mlxq.errors import MlxqError
    from mlxq.machine.backend import start_mlx
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    start_mlx()
    from mlxq.show import verify_tables

    original = brought(find_model(source, trusted=trust_remote_code)) if source is not None else None
    checks, errors = _run(folder, original, trusted=trust_remote_code)
    faults = [fault for check in checks for fault in check.faults]
    if console.as_json:
        console.json(verify_tables.verify_facts(folder, checks, errors))
    else:
        console.show(verify_tables.verify_table(checks))
        for check in checks:
            for note in check.notes:
                console.note(f"{check.name}: {note}")
    if faults:
        raise MlxqError("\n".join(f"{folder}: {fault}" for fault in faults))
    if not console.as_json:
        console.text(verify_tables.verdict(folder, checks, errors))


def _run(folder: Path, source: ModelSource | None, *, trusted: bool) -> tuple[list[Check], list[TensorError]]:
    """Every check with progress."""
    from mlxq.show.meters import progress
    from mlxq.sources.soundness import Read
    from mlxq.writing.fidelity import TensorError
    from mlxq.writing.verify import verify_folder

    checks: list[Check] = []
    errors: list[TensorError] = []
    with progress(f"Verifying {folder.name}") as meter:
        for event in verify_folder(folder, source, trusted=trusted):
            if isinstance(event, Read):
                meter.update(event.done_bytes, event.total_bytes, event.finished)
            elif isinstance(event, TensorError):
                errors.append(event)
            else:
                checks.append(event)
    return checks, errors
