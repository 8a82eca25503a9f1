"""Scores kept between runs, so that a second budget costs seconds."""

from __future__ import annotations

import hashlib
import io
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from mlxq.errors import BadInputError
from mlxq.files import write_whole
from mlxq.headers import parse_json
from mlxq.machine.cache import cache_folder
from mlxq.methods.formats import Format, fault_of
from mlxq.methods.registry import scored_by
from mlxq.reading import opened, read_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mlxq.planning.plan import Plan

# Part of every key: raised when scores would come out differently.
SCORES_VERSION = 3


def scores_key(plan: Plan, text_sha256: str, tokens: int) -> str:
    """What scores depend on beside module and format: the weights, the text, the encoder, and this code."""
    import mlx.core as mx

    weights = [(file.name, str(plan.source.as_opened[file])) for file in plan.source.weight_files]
    dtypes = [(step.path, step.spec.dtype) for step in plan.steps]
    encoders = sorted({scored_by(plan.recipe.method, fmt).name for fmt in plan.recipe.options})
    facts = [SCORES_VERSION, weights, dtypes, text_sha256, tokens, "+".join(encoders), str(mx.default_device())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class ScoreCache:
    """Scores and second moments of one model and text, by module path; empty where nothing usable is stored.

    ``remark`` says why nothing will be kept, or what was damaged and is made afresh; None where neither is so.
    """

    def __init__(self, key: str) -> None:
        self.scores: dict[tuple[str, Format], float] = {}
        self.moments: dict[str, npt.NDArray[np.float32]] = {}
        self.remark: str | None = None
        self._scores_file: Path | None = None
        try:
            folder = cache_folder() / "scores"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as exc:
            self.remark = f"scores are not kept for another run: cannot write {exc.filename}: {exc.strerror}"
            return
        self._scores_file = folder / f"{key}.json"
        self._moments_file = folder / f"{key}.npz"
        if self._scores_file.exists():
            self._read(self._scores_file)

    def _read(self, scores_file: Path) -> None:
        import numpy as np

        try:
            for entry in parse_json(read_bytes(scores_file), str(scores_file)):
                fmt = Format(**entry["format"])
                if fault_of(fmt.mode, fmt.bits, fmt.group_size) is not None or not math.isfinite(entry["divergence"]):
                    raise ValueError(entry)
                self.scores[str(entry["path"]), fmt] = float(entry["divergence"])
            with opened(self._moments_file) as stream, np.load(stream, allow_pickle=False) as stored:
                self.moments = {name: stored[name].astype(np.float32, casting="same_kind") for name in stored.files}
        # What numpy and zipfile raise for files that are cut short or hold something else.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadInputError, BadZipFile):
            self.scores, self.moments = {}, {}
            self.remark = f"{scores_file} is damaged; the scores are made afresh"

    def missing(self, options: Mapping[str, tuple[Format, ...]]) -> dict[str, tuple[Format, ...]]:
        """The options that have no score yet."""
        left = {path: tuple(f for f in formats if (path, f) not in self.scores) for path, formats in options.items()}
        return {path: formats for path, formats in left.items() if formats}

    def save(self) -> str | None:
        """Write both files, each whole or not at all. Returns why that failed, or None."""
        import numpy as np

        if self._scores_file is None:
            return None
        entries: list[dict[str, Any]] = [
            {"path": path, "format": fmt.as_config(), "divergence": score} for (path, fmt), score in self.scores.items()
        ]
        moments = io.BytesIO()
        np.savez(moments, **self.moments)  # type: ignore[arg-type]
        try:
            write_whole(self._moments_file, moments.getvalue())
            write_whole(self._scores_file, json.dumps(entries).encode())
        except OSError as exc:
            return f"scores are not kept for another run: cannot write {self._scores_file}: {exc.strerror}"
        return None
