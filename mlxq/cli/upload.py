"""``mlxq upload OUT org/name``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlxq.cli.options import Json, Quiet, TrustRemoteCode
from mlxq.show.console import console
from mlxq.show.watch import watching

if TYPE_CHECKING:
    from mlxq.publish.outlook import FileChange, Outlook
    from mlxq.publish.publish import Published
    from mlxq.recipe.target import Target


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
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a model on the Hub.

    Every file is checked first, the model card is written, and only what the Hub does not hold is sent.

    Example: mlxq upload ./my-model-4bit org/my-model-4bit --dry-run
    """
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.target import Target

    console.use(quiet=quiet, as_json=as_json)
    start_mlx()
    target = Target(repo, private, revision, create_pr, collection, message)
    if dry_run:
        _show_preview(folder, target, force=force, trusted=trust_remote_code)
        return
    done = publish_folder(folder, target, force=force, trusted=trust_remote_code)
    if console.as_json:
        console.json(_published_facts(done, target))
    else:
        console.text(done.url)


def publish_folder(folder: Path, target: Target, *, force: bool, trusted: bool) -> Published:
    """Check ``folder`` and publish it with progress."""
    from mlxq import api

    _show_bars()
    with watching() as tell:
        done = api.published(folder, target, force=force, trusted=trusted, on_event=tell)
    if not done.sent:
        console.note(f"nothing changed: {target.repo} holds all of it")
    return done


def publish_made(folder: Path, target: Target, *, trusted: bool) -> None:
    """Publish a model that was just made; where that fails, say how to go on without making it again."""
    from mlxq.errors import MlxqError

    try:
        done = publish_folder(folder, target, force=False, trusted=trusted)
    except MlxqError as exc:
        hint = f"The model is in {folder}. To publish it: mlxq upload {folder} {target.repo}"
        hint += " --trust-remote-code" if trusted else ""
        raise type(exc)(exc.message, f"{exc.hint} {hint}" if exc.hint else hint) from exc
    console.note(f"published: {done.url}")


def _show_preview(folder: Path, target: Target, *, force: bool, trusted: bool) -> None:
    from mlxq import api
    from mlxq.publish.publish import preview
    from mlxq.retry import told
    from mlxq.show import upload_tables

    _show_bars()
    with watching() as tell:
        checked = api.checked(folder, target, force=force, trusted=trusted, on_event=tell)
        outlook = told(preview(checked, target, force=force), tell)
    if console.as_json:
        console.json(_preview_facts(outlook, target))
        return
    console.show(upload_tables.upload_table(outlook))
    console.show(upload_tables.upload_summary(target, outlook))
    console.text(f"\nREADME.md:\n\n{outlook.card}")
    console.note("Nothing was sent. Run it without --dry-run to publish the model.")


def _show_bars() -> None:
    """The bars of ``huggingface_hub`` are for a terminal where somebody looks."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if console.quiet or not console.at_a_terminal:
        disable_progress_bars()


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
