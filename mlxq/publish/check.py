"""A finished model proved before it is published: every file, every hash, and that it loads."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError
from mlxq.recipe.target import Target, target_faults
from mlxq.writing import contract
from mlxq.writing.report import FILE_NAME, check_trust, hash_files, read_report
from mlxq.writing.verify import DRAWN, foreign_files, recorded_faults, standing_faults

# What mlx-lm would load beside the new weights, were it left from an earlier upload.
WEIGHTS = (contract.WEIGHTS, contract.INDEX)


@dataclass(frozen=True)
class Checked:
    """A finished model: what its ``mlxq.json`` says, and the size and SHA-256 of each file to publish.

    ``plot`` draws what was measured (PNG), where something was. ``problems`` are those that ``force`` let pass;
    ``left_out`` are files that mlxq did not write.
    """

    folder: Path
    report: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    plot: bytes | None
    problems: tuple[str, ...]
    left_out: tuple[str, ...]


def check_target(target: Target) -> None:
    """Refuse what cannot be, before anything is read. Raises BadInputError."""
    if faults := [message for _, message in target_faults(target)]:
        raise BadInputError("\n".join(faults))


def check_folder(folder: Path, *, force: bool = False, trusted: bool = False) -> Checked:
    """Prove that ``folder`` holds a whole model, as mlxq made it: every file, every hash, and that it loads.

    The card is excused: a person may edit it. Code of the model's own runs only where it is ``trusted``, and without
    trust a model that was made with it is refused. Raises BadInputError with every problem; ``force`` lets all pass
    but a missing ``mlxq.json``, without which there is nothing to publish by.
    """
    if not (folder / FILE_NAME).is_file():
        unfinished = folder.name.endswith(".partial") or folder.with_name(folder.name + ".partial").is_dir()
        raise BadInputError(
            f"{folder} is no finished model of mlxq: it has no {FILE_NAME}",
            "It was interrupted: run the command that made it again, and it continues."
            if unfinished
            else "Name the folder that mlxq quantize or mlxq convert wrote.",
        )
    report = read_report(folder / FILE_NAME)
    check_trust(report, str(folder), trusted=trusted)
    recorded: dict[str, dict[str, Any]] = report["files"]
    found = hash_files(folder)
    problems = list(recorded_faults(report, found))
    if not problems or force:
        # Bytes that are those recorded hold the numbers that were looked at when they were written.
        problems += standing_faults(folder, trusted=trusted)
    if problems and not force:
        raise BadInputError(
            "\n".join(f"{folder}: {problem}" for problem in problems),
            "Make it again, or publish it as it is with --force.",
        )
    files = {name: facts for name, facts in found.items() if name in recorded or fnmatch.fnmatch(name, WEIGHTS[0])}
    left_out = foreign_files(report, found)
    kept = {name: facts for name, facts in files.items() if name not in DRAWN}
    return Checked(folder, report, kept, _plot(report), tuple(problems), left_out)


def _plot(report: Mapping[str, Any]) -> bytes | None:
    from mlxq.writing import pictures

    measured = report.get("comparison")
    return pictures.as_png(pictures.one_model(measured)) if measured and "kl_histogram" in measured else None
