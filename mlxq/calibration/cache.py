"""Scores kept between runs, so that a second budget costs seconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlxq.machine.cache import cache_folder
from mlxq.methods.formats import Format
from mlxq.methods.registry import scored_by

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
    """Scores and second moments of one model and text, by module path; empty where nothing usable is stored."""

    def __init__(self, key: str) -> None:
        self.scores: dict[tuple[str, Format], float] = {}
        self.moments: dict[str, npt.NDArray[np.float32]] = {}
        self._scores_file = cache_folder() / "scores" / f"{key}.json"
        self._moments_file = self._scores_file.with_suffix(".npz")
        self._read()

    def _read(self) -> None:
        import numpy as np

        try:
            for entry in json.loads(self._scores_file.read_text(encoding="utf-8")):
                self.scores[entry["path"], Format(**entry["format"])] = float(entry["divergence"])
            with np.load(self._moments_file) as stored:
                self.moments = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, KeyError, TypeError):  # a cache that cannot be read is an empty one
            self.scores, self.moments = {}, {}

    def missing(self, options: Mapping[str, tuple[Format, ...]]) -> dict[str, tuple[Format, ...]]:
        """The options that have no score yet."""
        left = {path: tuple(f for f in formats if (path, f) not in self.scores) for path, formats in options.items()}
        return {path: formats for path, formats in left.items() if formats}

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        import numpy as np

        entries: list[dict[str, Any]] = [
            {"path": path, "format": fmt.as_config(), "divergence": score} for (path, fmt), score in self.scores.items()
        ]
        self._scores_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._moments_file.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **self.moments)  # type: ignore[arg-type]
        os.replace(temporary, self._moments_file)
        temporary = self._scores_file.with_suffix(f".{os.getpid()}.new")
        temporary.write_text(json.dumps(entries), encoding="utf-8")
        os.replace(temporary, self._scores_file)
