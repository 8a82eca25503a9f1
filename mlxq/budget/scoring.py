"""What each module would lose in each format it may take: measured on a text, or from its weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlxq.architecture.roles import routers
from mlxq.budget.allocate import Option
from mlxq.calibration.cache import ScoreCache
from mlxq.calibration.sensitivity import scores
from mlxq.calibration.statistics import InputStatistics
from mlxq.calibration.streamed import StreamedModel, read_parameters
from mlxq.calibration.tokens import CalibrationText
from mlxq.machine.cores import on_row_shares
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide
from mlxq.methods.registry import scored_by
from mlxq.planning.plan import By, Plan
from mlxq.tensors import FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

# Most tokens that scores are taken over.
SCORE_TOKENS = 4096
# A router that sends tokens to the wrong experts costs more than its bytes; this is the least it gets.
ROUTER_BITS = 8


@dataclass(frozen=True)
class Scoring:
    """How far it is: ``done`` of ``total`` steps of ``stage``."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Remark:
    """Something that a person should know, and that stops nothing."""

    text: str


def allowed_formats(draft: Plan) -> dict[str, tuple[Format, ...]]:
    """The formats that each module the budget decides may take: those that fit its width and what the model asks."""
    modules = {module.path: module for module in draft.architecture.modules}
    choosers = routers(draft.architecture.modules)
    found = {}
    for decision in draft.decisions:
        module = modules[decision.path]
        if decision.by is not By.BUDGET or not decision.quantizable or module.asked is False:
            continue
        least = module.asked.bits if isinstance(module.asked, Format) else 0
        least = max(least, ROUTER_BITS if decision.path in choosers else 0)
        fitting = (fmt.fitted_to(decision.shape[-1]) for fmt in draft.recipe.options if fmt.bits >= least)
        formats = tuple(dict.fromkeys(fmt for fmt in fitting if fmt is not None))
        if not formats and isinstance(module.asked, Format):
            formats = (module.asked,)
        if formats:
            found[decision.path] = formats
    return found


def module_bytes(draft: Plan, path: str, fmt: Format | None) -> int:
    """Every byte that a module's weight writes in ``fmt``, None being its dtype."""
    decision = draft.by_path[path]
    spec = TensorSpec(f"{path}.weight", decision.dtype, decision.shape)
    return sum(part.nbytes for part in fmt.layout(spec)) if fmt else spec.nbytes


def scored_options(
    draft: Plan, formats: Mapping[str, tuple[Format, ...]], scored: Mapping[tuple[str, Format], float]
) -> dict[str, tuple[Option, ...]]:
    """Scored choices; leaving a module unquantized is always one, and costs no divergence."""
    return {
        path: (
            *(Option(fmt, module_bytes(draft, path, fmt), scored[path, fmt]) for fmt in choices),
            Option(None, module_bytes(draft, path, None), 0.0),
        )
        for path, choices in formats.items()
    }


def score_on_text(
    draft: Plan,
    streamed: StreamedModel,
    text: CalibrationText,
    formats: Mapping[str, tuple[Format, ...]],
    cache: ScoreCache,
) -> Iterator[Scoring | Remark]:
    """Fill ``cache`` with what it lacks of ``formats``."""
    missing = cache.missing(formats)
    if not missing:
        return
    encoder = Decoder(draft, cache)
    total = sum(len(choices) for choices in missing.values())
    yield Scoring("scoring", 0, total)
    found = scores(streamed.sequence, text.batches[: _batches_of(text.batches)], missing, encoder.scored, streamed.hold)
    for done, score in enumerate(found, start=1):
        cache.scores[score.path, score.fmt] = score.divergence
        yield Scoring("scoring", done, total)
    if (unkept := cache.save()) is not None:
        yield Remark(unkept)


def _batches_of(batches: Sequence[mx.array]) -> int:
    """How many batches hold ``SCORE_TOKENS``: scores need fewer tokens than Hessians, and cost more for each."""
    return max(1, SCORE_TOKENS // batches[0].size)


class Decoder:
    """What weights would be after encoding, for scores; keeps the second moments that it was first shown."""

    def __init__(self, draft: Plan, cache: ScoreCache) -> None:
        self.dtypes = {decision.path: decision.dtype for decision in draft.decisions}
        self.asked = draft.recipe.method
        self.moments = cache.moments

    def scored(self, path: str, weight: mx.array, fmt: Format, statistics: InputStatistics | None) -> mx.array:
        """The decoded weight, with what the text says of its inputs noted for later."""
        import numpy as np

        if statistics is not None and path not in self.moments:
            self.moments[path] = np.array(statistics.second_moment)
        return self.decoded(path, weight, fmt)

    def decoded(self, path: str, weight: mx.array, fmt: Format) -> mx.array:
        """The float32 weights that ``fmt`` would store."""
        import mlx.core as mx

        importance = mx.array(self.moments[path]) if path in self.moments else None
        stored = weight.astype(getattr(mx, FLOAT_DTYPES[self.dtypes[path]]))
        mx.eval(stored, [] if importance is None else importance)

        method = scored_by(self.asked, fmt)

        def part(rows: mx.array) -> mx.array:
            return fmt.decode(method.encode(rows, fmt, Guide(importance)).arrays())

        return on_row_shares(part, stored)


def score_by_weights(
    draft: Plan, formats: Mapping[str, tuple[Format, ...]]
) -> Iterator[tuple[tuple[str, Format], float]]:
    """Relative squared error of each module in each format: what can be said without text."""
    import mlx.core as mx

    names = {f"{path}.weight" for path in formats}
    for name, weight in read_parameters(draft.source, draft.architecture, names):
        path = name.removesuffix(".weight")
        stored = weight.astype(getattr(mx, FLOAT_DTYPES[draft.by_path[path].dtype]))
        power = float((weight * weight).sum()) or 1.0
        for fmt in formats[path]:
            encoded = scored_by(draft.recipe.method, fmt).encode(stored, fmt, Guide())
            error = fmt.decode(encoded.arrays()) - weight
            yield (path, fmt), float((error * error).sum()) / power
