"""The ``mlxq`` command: one module per subcommand, each parse -> call -> show."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mlxq import __version__
from mlxq.cli import compare, convert, env, inspect, quantize, recipes, upload, verify
from mlxq.cli.ending import ended

app = typer.Typer(
    name="mlxq",
    help="Convert and quantize language models for Apple's MLX.",
    no_args_is_help=True,
    # Plain help: the boxed one imports a Markdown parser and a highlighter, which doubles the time to answer.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: mlxq inspect MODEL, then mlxq quantize 4bit --model MODEL. Docs: docs/ in the repository.",
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"mlxq {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("inspect")(inspect.command)
app.command("convert")(convert.command)
app.command("quantize")(quantize.command)
app.command("compare")(compare.command)
app.command("verify")(verify.command)
app.command("upload")(upload.command)
app.add_typer(recipes.app, name="recipes")
app.command("env")(env.command)


def main() -> None:
    """Run the program; whatever it meets becomes one line and an exit code."""
    raise SystemExit(ended(app))
