"""``mlxq upload OUT org/name``."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxq.cli.options import Json, Quiet

if TYPE_CHECKING:
    from mlxq.publish.publish import Checked, FileChange, Outlook, Published, Step
    from mlxq.recipe.target import Target
    from mlxq.retry import Waiting


def command(
    folder: Annotated[Path, typer.Argument(help="A folder that mlxq quantize or mlxq convert wrote.")],
    repo: Annotated[str, typer.Argument(help="Where it goes: org/name; created where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Create it so that only its owners see it.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to put it on; made where there is none.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files, what would change, and the card; send nothing.")
    ] = False,
    collection: Annotated[
        str | None, typer.Option("--collection", help="Add it to this collection (owner/title-0123456789ab).")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Publish even what does not match its mlxq.json, or does not load.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a model on the Hub.

    Every file is checked first, the model card is written, and only what the Hub does not hold is sent.

    Example: mlxq upload ./my-model-4bit org/my-model-4bit --dry-run
    """
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.target import Target
    from mlxq.show.console import show_json, show_text

    start_mlx()
    target = Target(repo, private, revision, create_pr, collection, message)
    if dry_run:
        _show_preview(folder, target, force=force, as_json=as_json, quiet=quiet)
        return
    done = publish_folder(folder, target, force=force, quiet=quiet)
    if as_json:
        show_json(_published_facts(done, target))
    else:
        show_text(done.url)


def publish_folder(folder: Path, target: Target, *, force: bool, quiet: bool) -> Published:
    """Check ``folder`` and publish it with progress."""
    from mlxq.publish.publish import publish
    from mlxq.show.console import note

    checked = _check(folder, target, force=force, quiet=quiet)
    done = _finish(publish(checked, target, force=force), quiet=quiet)
    if not done.sent:
        note(f"nothing changed: {target.repo} holds all of it", quiet=quiet)
    return done


def publish_made(folder: Path, target: Target, *, quiet: bool) -> None:
    """Publish a model that was just made; where that fails, say how to go on without making it again."""
    from mlxq.errors import MlxqError
    from mlxq.show.console import note

    try:
        done = publish_folder(folder, target, force=False, quiet=quiet)
    except MlxqError as exc:
        hint = f"The model is in {folder}. To publish it: mlxq upload {folder} {target.repo}"
        raise type(exc)(exc.message, f"{exc.hint} {hint}" if exc.hint else hint) from exc
    note(f"published: {done.url}", quiet=quiet)


def _show_preview(folder: Path, target: Target, *, force: bool, as_json: bool, quiet: bool) -> None:
    from mlxq.publish.publish import preview
    from mlxq.show import tables
    from mlxq.show.console import note, show, show_json, show_text

    checked = _check(folder, target, force=force, quiet=quiet)
    outlook = _result(preview(checked, target, force=force))
    if as_json:
        show_json(_preview_facts(outlook, target))
        return
    show(tables.upload_table(outlook))
    show(tables.upload_summary(target, outlook))
    show_text(f"\nREADME.md:\n\n{outlook.card}")
    note("Nothing was sent. Run it without --dry-run to publish the model.", quiet=quiet)


def _check(folder: Path, target: Target, *, force: bool, quiet: bool) -> Checked:
    import sys

    from huggingface_hub.utils.tqdm import disable_progress_bars

    from mlxq.publish.publish import check_folder, check_target
    from mlxq.show.console import note, warn

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    check_target(target)
    note(f"checking every file of {folder}", quiet=quiet)
    checked = check_folder(folder, force=force)
    for problem in checked.problems:
        warn(f"{problem}; published all the same, as --force asks")
    for name in checked.left_out:
        warn(f"{name} was not written by mlxq, so it is left out")
    return checked


def _finish(events: Iterator[Step | Waiting | Published], *, quiet: bool) -> Published:
    from mlxq.publish.publish import Published
    from mlxq.retry import Waiting
    from mlxq.show.console import note

    for event in events:
        if isinstance(event, Published):
            return event
        if isinstance(event, Waiting):
            _say_waiting(event)
        else:
            note(event.what, quiet=quiet)
    raise AssertionError("publishing ends with what was published")


def _result(events: Generator[Waiting, None, Outlook]) -> Outlook:
    while True:
        try:
            _say_waiting(next(events))
        except StopIteration as stop:
            found: Outlook = stop.value
            return found


def _say_waiting(event: Waiting) -> None:
    from mlxq.show.console import warn

    warn(f"{event.reason}; trying again in {event.seconds:.0f} s")


def _preview_facts(outlook: Outlook, target: Target) -> dict[str, Any]:
    return {
        "schema": "mlxq.upload",
        "schema_version": 1,
        "repo": target.repo,
        "revision": target.branch,
        "dry_run": True,
        "exists": outlook.remote.exists,
        "files": [_file_facts(change) for change in outlook.changes],
        "card": outlook.card,
    }


def _published_facts(done: Published, target: Target) -> dict[str, Any]:
    return {
        "schema": "mlxq.upload",
        "schema_version": 1,
        "repo": target.repo,
        "revision": target.branch,
        "dry_run": False,
        "created": done.created,
        "url": done.url,
        "commit": done.commit,
        "pull_request": done.pull_request,
        "files": [_file_facts(change) for change in done.sent],
    }


def _file_facts(change: FileChange) -> dict[str, Any]:
    return {"name": change.name, "size_bytes": change.size_bytes, "change": change.change}
