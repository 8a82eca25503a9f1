"""``mlxq.json``: what was done to a model, why, and what came out. Every table and card is drawn from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxq import __version__
from mlxq.errors import BadInputError
from mlxq.files import NEW, sha256_file, write_durably
from mlxq.headers import encode_header, read_json
from mlxq.metrics.size import Size
from mlxq.places import without_places
from mlxq.planning.plan import Decision, Plan
from mlxq.recipe.model import Recipe
from mlxq.sources.base import ModelSource
from mlxq.sources.belongings import TEMPLATES
from mlxq.writing.report_shape import fault_of_report

FILE_NAME = "mlxq.json"
SCHEMA_VERSION = 1


def source_facts(source: ModelSource) -> dict[str, Any]:
    """Where the weights came from; ``headers_sha256`` identifies the checkpoint's names, dtypes and shapes."""
    header = encode_header(sorted(source.tensors.values(), key=lambda spec: spec.name), {})
    return {
        "name": source.name,
        "kind": source.kind,
        "base_model": source.base_model,
        "revision": source.revision,
        "stored_bytes": source.stored_bytes,
        "headers_sha256": hashlib.sha256(header).hexdigest(),
    }


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan as data: what ``--dry-run --json`` prints and ``mlxq.json`` keeps."""
    recipe = plan.recipe
    return {
        "source": source_facts(plan.source),
        "recipe": {"name": recipe.name, "text": recipe.text, "resolved": recipe.resolved()},
        "uncalibrated": plan.uncalibrated,
        "weight_bytes": plan.weight_bytes,
        "file_bytes": plan.file_bytes,
        "files": {shard.file: shard.nbytes for shard in plan.shards},
        "parameter_count": plan.parameter_count,
        "bits_per_weight": plan.bits_per_weight,
        "modules": [_module(decision) for decision in plan.decisions],
        "left_out": [asdict(part) for part in plan.architecture.left_out],
        "left_behind": dict(plan.source.left_behind),
        "notes": list(plan.notes),
        "budget": plan.spending,
    }


def _module(decision: Decision) -> dict[str, Any]:
    return {
        "path": decision.path,
        "shape": list(decision.shape),
        "dtype": decision.dtype,
        "format": decision.format.as_config() if decision.format else None,
        "decided_by": decision.decided_by,
        "also_matched": list(decision.also),
        "model_asks": decision.asked,
        "note": decision.note,
        "method": decision.method,
        "nbytes": decision.nbytes,
    }


def build_report(
    plan: Plan,
    size: Size,
    timings: Mapping[str, float],
    peak_memory_bytes: int,
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything ``mlxq.json`` holds, fit to be published.

    Timings are in seconds; ``files`` is what ``hash_files`` says of the folder.
    """
    facts = plan_facts(plan)
    report = {
        "schema": "mlxq.report",
        "schema_version": SCHEMA_VERSION,
        "versions": versions(),
        "source": facts["source"],
        "recipe": facts["recipe"],
        "uncalibrated": facts["uncalibrated"],
        "options": plan.options,
        "modules": facts["modules"],
        "left_out": facts["left_out"],
        "left_behind": facts["left_behind"],
        "notes": facts["notes"],
        "budget": facts["budget"],
        "metrics": {
            "size_bytes": size.size_bytes,
            "weight_bytes": size.weight_bytes,
            "parameter_count": size.parameter_count,
            "bits_per_weight": size.bits_per_weight,
            "source_bytes": plan.source.stored_bytes,
            "peak_memory_bytes": peak_memory_bytes,
        },
        "timings_s": dict(timings),
        "files": dict(files),
    }
    return shareable(report, plan.recipe)


def shareable(report: Mapping[str, Any], recipe: Recipe | None = None) -> dict[str, Any]:
    """The report as the world may read it: without where on this machine its model, recipe and texts lie."""
    known = () if recipe is None else (recipe.path, recipe.model, recipe.output, *recipe.calibration.texts)
    shown: dict[str, Any] = without_places(report, [path for path in known if path])
    return shown


def hash_files(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a finished folder but ``mlxq.json`` itself.

    ``known``, by name, need not be hashed again.
    """
    from concurrent.futures import ThreadPoolExecutor

    known = known or {}
    skipped = {FILE_NAME, FILE_NAME + NEW}
    inside = (*folder.iterdir(), *(folder / TEMPLATES).glob("*"))
    names = sorted(f.relative_to(folder).as_posix() for f in inside if f.is_file() and f.name not in skipped)
    with ThreadPoolExecutor(2) as pool:
        digests = pool.map(lambda name: known.get(name) or sha256_file(folder / name), names)
        sizes = [(folder / name).stat().st_size for name in names]
        return {n: {"bytes": b, "sha256": d} for n, b, d in zip(names, sizes, digests, strict=True)}


def versions() -> dict[str, str]:
    """Versions of everything that touches the weights."""
    from importlib.metadata import version

    return {"mlxq": __version__, **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")}}


def report_bytes(report: Mapping[str, Any]) -> bytes:
    """A ``mlxq.json`` as it is stored."""
    return (json.dumps(shareable(report), indent=2) + "\n").encode()


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``mlxq.json``: a reader, and power loss, find the old or the new one, never half."""
    write_durably(folder / FILE_NAME, report_bytes(report))


def read_report(file: Path) -> dict[str, Any]:
    """Read a ``mlxq.json``. Raises BadInputError where it is not one, or a newer one than this mlxq knows."""
    if not file.exists():
        raise BadInputError(f"no such file: {file}", "Name the mlxq.json beside a model that mlxq wrote.")
    report = read_json(file)
    if report.get("schema") != "mlxq.report":
        raise BadInputError(f"{file} is not an mlxq report")
    version = report.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise BadInputError(f"{file} was written by a newer mlxq", "Update mlxq.")
    if version != SCHEMA_VERSION or (fault := fault_of_report(report)) is not None:
        wrong = f"its schema_version is {version!r}" if version != SCHEMA_VERSION else fault
        raise BadInputError(
            f"{file} is not a report that this mlxq can read: {wrong}",
            "It was changed, or came from elsewhere; mlxq writes it anew with the model.",
        )
    return report


def check_trust(report: Mapping[str, Any], what: str, *, trusted: bool) -> None:
    """Raise BadInputError where ``what`` was made with code of the model's own, which the person has not ``trusted``.

    A report is a file like any other: it tells that trust was given once, and gives none.
    """
    options = report.get("options")
    if isinstance(options, Mapping) and options.get("trust_remote_code") and not trusted:
        raise BadInputError(
            f"{what} was made with --trust-remote-code, and a file cannot say that the model's own code may run",
            "Read that code; if you trust it, add --trust-remote-code.",
        )
