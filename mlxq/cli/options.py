"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md) on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; errors still show.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan, to the byte; reads no weights, except to spend a budget.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let mlx-lm run the model file that a repository brings.")
]
LowDisk = Annotated[
    bool,
    typer.Option(
        "--low-disk", help="Fetch a Hub model file by file as each is needed, and drop it after its last use."
    ),
]
Generate = Annotated[
    bool,
    typer.Option(
        "--generate/--no-generate", help="Answer a short prompt with the result, within a minute, and show its speed."
    ),
]
