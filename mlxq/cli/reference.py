"""``docs/cli.md``, generated from the program itself: ``python -m mlxq.cli.reference [--check] FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer.main

from mlxq.cli import app


def reference() -> str:
    """Every command with its arguments, options and help, as Markdown."""
    root = typer.main.get_command(app)
    lines = [
        "# Commands",
        "",
        "Generated from the program by `python -m mlxq.cli.reference docs/cli.md`.",
        "",
        "Data goes to stdout; progress, notes and errors to stderr. Exit codes: 0 done, 1 the run failed, 2 bad input,",
        "3 a quality gate failed, 130 interrupted. `MLXQ_DEBUG=1` adds the traceback to an error; `NO_COLOR=1` turns",
        "colours off. `mlxq --install-completion` sets up completion for your shell.",
        "",
    ]
    lines += _section(root, "mlxq")
    return "\n".join(lines).rstrip() + "\n"


def _section(command: Any, path: str) -> list[str]:
    lines = [f"## `{path}`", "", (command.help or "").replace("[rich]", "").strip(), ""]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    if arguments or options:
        lines += ["| | |", "|---|---|"]
        for argument in arguments:
            lines.append(f"| `{argument.name.upper()}` | {argument.help or ''} |")
        for option in options:
            names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
            lines.append(f"| {names} | {option.help or ''} |")
        lines.append("")
    for name, child in getattr(command, "commands", {}).items():
        lines += _section(child, f"{path} {name}")
    return lines


def main() -> None:
    """Write the file, or with ``--check`` fail where it is out of date."""
    *flags, target = sys.argv[1:]
    file = Path(target)
    if flags == ["--check"]:
        if file.read_text(encoding="utf-8") != reference():
            raise SystemExit(f"{file} is out of date: run python -m mlxq.cli.reference {file}")
    else:
        file.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
