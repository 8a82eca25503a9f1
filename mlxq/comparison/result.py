"""What a comparison found: of each model, and in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxq.calibration.text import TextInfo
from mlxq.metrics.faithfulness import Faithfulness
from mlxq.metrics.size import Size
from mlxq.running.speed import Speed
from mlxq.shown import Shown


@dataclass(frozen=True)
class ModelResult:
    """All that was measured of one model; None for what was not. ``tied``: inside the noise floor.

    ``reference_ppl`` is set for the reference alone: its own perplexity, once a candidate was run beside it.
    ``not_timed`` says why a speed that was asked for is missing.
    """

    name: str
    size: Size
    layer_bits: Mapping[str, float]
    faithfulness: Faithfulness | None
    speed: Speed | None
    tied: bool
    reference_ppl: float | None = None
    not_timed: str | None = None
    budget: Mapping[str, Any] | None = None

    def metrics(self) -> dict[str, float | None]:
        """Every metric by name, None where not measured."""
        found: dict[str, float | None] = {
            "size_bytes": self.size.size_bytes,
            "bits_per_weight": self.size.bits_per_weight,
        }
        if self.speed:
            found |= self.speed.metrics()
        if self.faithfulness:
            found |= self.faithfulness.metrics()
        if self.reference_ppl is not None:
            found["ppl"] = self.reference_ppl
        return found


@dataclass(frozen=True)
class Comparison(Shown):
    """The reference (first of ``results``) and every model measured so far.

    ``noise_floor`` is the reference in its own dtype against itself in fp32. ``notes`` say how it was
    measured. ``complete`` is False for a snapshot taken before the last model.
    """

    results: tuple[ModelResult, ...]
    text: TextInfo
    noise_floor: Faithfulness
    notes: tuple[str, ...]
    complete: bool

    @property
    def reference(self) -> ModelResult:
        """What the others are measured against."""
        return self.results[0]

    @property
    def candidates(self) -> tuple[ModelResult, ...]:
        """All but the reference."""
        return self.results[1:]


def verdict(result: ModelResult, reference: ModelResult) -> str:
    """One line: how much smaller and faster ``result`` is, and what it cost."""
    said = [_times(reference.size.size_bytes / result.size.size_bytes, "smaller", "larger")]
    if result.speed and reference.speed:
        said.append(_times(result.speed.generation_tps / reference.speed.generation_tps, "faster", "slower"))
    if found := result.faithfulness:
        said.append(f"{found.top1_agreement:.1%} top-1 agreement")
        said.append(f"perplexity {found.ppl_ratio - 1:+.1%} \u00b1 {found.ppl_ratio_se:.1%}")
    line = f"{result.name} is {', '.join(said)}"
    return line + ("; inside the noise floor, so tied with the reference" if result.tied else "")


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"
