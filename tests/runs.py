"""Whole runs, and what they leave."""

from __future__ import annotations

from pathlib import Path

from mlxq.files import sha256_file
from mlxq.pipeline import Finished, prepare, run
from mlxq.planning.plan import Stored
from mlxq.recipe.model import Recipe
from mlxq.sources.resolve import resolve


def quantize(model: Path, out: Path, recipe: Recipe, stored: Stored = Stored.AS_IS) -> Finished:
    """Run the whole line and return its last event."""
    plan = prepare(recipe, resolve(str(model)), stored)
    *_, last = run(plan, out)
    assert isinstance(last, Finished)
    assert plan.file_bytes == sum(f.stat().st_size for f in out.glob("model*.safetensors"))
    return last


def hashes(folder: Path) -> dict[str, str]:
    """Of all that the model is; report and card name where it came from."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in ("mlxq.json", "README.md")]
    return {f.relative_to(folder).as_posix(): sha256_file(f) for f in files}
