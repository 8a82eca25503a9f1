"""A budget spent: formats for the modules that no rule decides, chosen by score and checked by measurement."""

from __future__ import annotations

import statistics as stats
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.architecture.kv_cache import activation_bytes, kv_cache_bytes
from mlxq.architecture.roles import routers
from mlxq.budget.allocate import Allocation, Option, allocate, frontier
from mlxq.calibration.cache import ScoreCache, scores_key
from mlxq.calibration.measured import Assignment, measured_divergences
from mlxq.calibration.sensitivity import scores
from mlxq.calibration.statistics import InputStatistics
from mlxq.calibration.streamed import StreamedModel, read_parameters, streamed_model
from mlxq.calibration.text import TextInfo
from mlxq.calibration.tokens import CalibrationText, calibration_text
from mlxq.errors import BadInputError
from mlxq.machine.devices import find_device, this_machine
from mlxq.machine.memory import weight_room
from mlxq.methods.formats import Format
from mlxq.methods.method import Guide
from mlxq.methods.registry import scored_by
from mlxq.metrics.forward import on_row_shares
from mlxq.planning.plan import By, Plan
from mlxq.recipe.model import Budget
from mlxq.tensors import FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

# A change of mind must win by this many standard errors of the paired difference (two-sided 95%, 7 degrees of freedom).
PAIRED_ERRORS = 2.36
# Most tokens that scores are taken over.
SCORE_TOKENS = 4096
# What exceeds the budget by no more of it is measured beside the others, though never chosen.
SAME_SIZE = 0.005
# Points of the size-KL curve, and how many of them are measured.
CURVE_POINTS = 13
MEASURED_POINTS = 4
# A router that sends tokens to the wrong experts costs more than its bytes; this is the least it gets.
ROUTER_BITS = 8


@dataclass(frozen=True)
class Scoring:
    """How far it is: ``done`` of ``total`` steps of ``stage``."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Check:
    """An assignment held against the chosen one on held-out text: its bytes, measured KL in nats, standard error.

    One that does not fit the budget is there to compare with.
    """

    name: str
    weight_bytes: int
    kl_mean: float
    kl_mean_se: float
    chosen: bool
    fits: bool


@dataclass(frozen=True)
class CurvePoint:
    """The best assignment at a size: predicted KL, and the measured one where it was measured, in nats."""

    weight_bytes: int
    bits_per_weight: float
    predicted_kl: float
    measured_kl: float | None
    measured_kl_se: float | None


@dataclass(frozen=True)
class Spending:
    """What a budget came to.

    ``allocation`` covers the modules the budget decides; ``fixed_bytes`` is what everything else takes.
    ``options`` are the scored choices by module. ``text`` is None where scores come from weights alone: they are
    then relative squared errors and no KL, and nothing is measured.
    """

    budget: Budget
    budget_bytes: int
    fixed_bytes: int
    parameter_count: int
    options: Mapping[str, tuple[Option, ...]]
    allocation: Allocation
    text: TextInfo | None
    checks: tuple[Check, ...]
    curve: tuple[CurvePoint, ...]
    seconds: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors under the chosen allocation."""
        return self.fixed_bytes + self.allocation.nbytes

    def facts(self) -> dict[str, Any]:
        """As ``mlxq.json`` and ``--json`` hold it."""
        return {
            "asked": self.budget.resolved(),
            "budget_bytes": self.budget_bytes,
            "weight_bytes": self.weight_bytes,
            "predicted_kl": self.allocation.divergence if self.text else None,
            "optimality_gap": self.allocation.gap,
            "text": None if self.text is None else dict(vars(self.text)),
            "checks": [vars(check) for check in self.checks],
            "curve": [vars(point) for point in self.curve],
            "seconds": self.seconds,
        }


def spend(
    draft: Plan, presets: Mapping[str, Assignment], *, measure_curve: bool = False
) -> Iterator[Scoring | Spending]:
    """Choose formats for the modules of ``draft`` that its budget decides; the last item is the Spending.

    ``draft`` has those modules unquantized. ``presets`` are simpler assignments, by name, to be beaten on held-out
    text. Raises BadInputError where even the smallest options exceed the budget.
    """
    began = time.perf_counter()
    budget = draft.recipe.budget
    assert budget is not None
    formats = options_of(draft)
    if not formats:
        raise BadInputError("rules decide every module, so the budget has nothing to decide", "Remove it, or a rule.")
    fixed = draft.weight_bytes - sum(_bytes(draft, path, None) for path in formats)
    room = budget_bytes(draft, budget)
    _check_room(draft, formats, fixed, room, budget)
    if not draft.calibration.has_text:
        scored = dict(_weight_scores(draft, formats))
        options = _options(draft, formats, scored)
        allocation = allocate(options, room - fixed)
        curve = tuple(_curve(draft, options, fixed))
        yield Spending(
            budget,
            room,
            fixed,
            draft.parameter_count,
            options,
            allocation,
            None,
            (),
            curve,
            time.perf_counter() - began,
        )
        return
    with streamed_model(draft.source, draft.architecture) as streamed:
        text = calibration_text(draft.calibration, streamed)
        cache = ScoreCache(scores_key(draft, text.info.ids_sha256, sum(batch.size for batch in text.batches)))
        yield from _score(draft, streamed, text, formats, cache)
        options = _options(draft, formats, cache.scores)
        encoder = _Decoder(draft, cache)
        rivals = _rivals(options, room - fixed, presets)
        measured: list[list[float]] = []
        for step in measured_divergences(streamed, text.held_out, [r.formats for r in rivals], encoder.decoded):
            if isinstance(step, int):
                yield Scoring("checking", step, len(streamed.sequence.blocks))
            else:
                measured = step
        best = _winner(measured, [rival.nbytes <= room - fixed for rival in rivals])
        checks = tuple(
            Check(
                rival.name,
                fixed + rival.nbytes,
                *_mean_and_error(sequences),
                chosen=index == best,
                fits=rival.nbytes <= room - fixed,
            )
            for index, (rival, sequences) in enumerate(zip(rivals, measured, strict=True))
        )
        allocation = _as_allocation(options, rivals[best].formats, room - fixed)
        curve = tuple(_curve(draft, options, fixed))
        if measure_curve:
            picks = [curve[i * (len(curve) - 1) // (MEASURED_POINTS - 1)] for i in range(MEASURED_POINTS)]
            assignments = [allocate(options, point.weight_bytes - fixed).formats for point in picks]
            for step in measured_divergences(streamed, text.held_out, assignments, encoder.decoded):
                if isinstance(step, int):
                    yield Scoring("measuring the curve", step, len(streamed.sequence.blocks))
                else:
                    found = {p.weight_bytes: _mean_and_error(s) for p, s in zip(picks, step, strict=True)}
                    curve = tuple(
                        CurvePoint(
                            p.weight_bytes,
                            p.bits_per_weight,
                            p.predicted_kl,
                            *found.get(p.weight_bytes, (None, None)),
                        )
                        for p in curve
                    )
    yield Spending(
        budget,
        room,
        fixed,
        draft.parameter_count,
        options,
        allocation,
        text.info,
        checks,
        curve,
        time.perf_counter() - began,
    )


def options_of(draft: Plan) -> dict[str, tuple[Format, ...]]:
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


def budget_bytes(draft: Plan, budget: Budget) -> int:
    """Bytes that all tensors together may take."""
    headers = draft.file_bytes - draft.weight_bytes
    # Scales and biases make headers longer than the draft's, which has none of them.
    headers += sum(len(str(d.path)) * 2 + 256 for d in draft.decisions if d.by is By.BUDGET)
    if budget.bpw is not None:
        return int(budget.bpw * draft.parameter_count / 8)
    if budget.size_bytes is not None:
        return budget.size_bytes - headers
    assert budget.device is not None
    device = this_machine() if budget.device == "this-machine" else find_device(budget.device)
    config = draft.source.config
    cache, activations = kv_cache_bytes(config, budget.context), activation_bytes(config, budget.context)
    return weight_room(device, kv_cache_bytes=cache, activation_bytes=activations) - headers


def _check_room(draft: Plan, formats: Mapping[str, tuple[Format, ...]], fixed: int, room: int, budget: Budget) -> None:
    smallest = fixed + sum(min(_bytes(draft, path, fmt) for fmt in choices) for path, choices in formats.items())
    if smallest > room:
        bpw = smallest * 8 / draft.parameter_count
        raise BadInputError(
            f"the budget of {budget} leaves {max(room, 0) / 1e6:,.1f} MB for the weights, "
            f"and the smallest options take {smallest / 1e6:,.1f} MB ({bpw:.2f} bits per weight)",
            "Raise the budget, add smaller options, or let fewer rules fix formats.",
        )


def _bytes(draft: Plan, path: str, fmt: Format | None) -> int:
    """Every byte that a module's weight writes in ``fmt``, None being its dtype."""
    decision = draft.by_path[path]
    spec = TensorSpec(f"{path}.weight", decision.dtype, decision.shape)
    return sum(part.nbytes for part in fmt.layout(spec)) if fmt else spec.nbytes


def _options(
    draft: Plan, formats: Mapping[str, tuple[Format, ...]], scored: Mapping[tuple[str, Format], float]
) -> dict[str, tuple[Option, ...]]:
    """Scored choices; leaving a module unquantized is always one, and costs no divergence."""
    return {
        path: (
            *(Option(fmt, _bytes(draft, path, fmt), scored[path, fmt]) for fmt in choices),
            Option(None, _bytes(draft, path, None), 0.0),
        )
        for path, choices in formats.items()
    }


def _score(
    draft: Plan,
    streamed: StreamedModel,
    text: CalibrationText,
    formats: Mapping[str, tuple[Format, ...]],
    cache: ScoreCache,
) -> Iterator[Scoring]:
    """Fill ``cache`` with what it lacks of ``formats``."""
    missing = cache.missing(formats)
    if not missing:
        return
    encoder = _Decoder(draft, cache)
    total = sum(len(choices) for choices in missing.values())
    yield Scoring("scoring", 0, total)
    found = scores(streamed.sequence, text.batches[: _batches_of(text.batches)], missing, encoder.scored, streamed.hold)
    for done, score in enumerate(found, start=1):
        cache.scores[score.path, score.fmt] = score.divergence
        yield Scoring("scoring", done, total)
    cache.save()


def _batches_of(batches: Sequence[mx.array]) -> int:
    """How many batches hold ``SCORE_TOKENS``: scores need fewer tokens than Hessians, and cost more for each."""
    return max(1, SCORE_TOKENS // batches[0].size)


class _Decoder:
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


def _weight_scores(
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


@dataclass(frozen=True)
class _Rival:
    """An assignment to be measured, and its bytes in the modules that the budget decides."""

    name: str
    formats: Assignment
    nbytes: int


def _rivals(options: Mapping[str, tuple[Option, ...]], room: int, presets: Mapping[str, Assignment]) -> list[_Rival]:
    """The allocation by score first, then variations on it, then the largest simpler assignments of this size."""
    nbytes = {(path, option.fmt): option.nbytes for path, choices in options.items() for option in choices}

    def rival(name: str, formats: Assignment) -> _Rival:
        return _Rival(name, formats, sum(nbytes[path, formats[path]] for path in options))

    rivals = [rival("by score", allocate(options, room).formats)]
    narrowed = {
        "no group of few bits": {
            path: tuple(o for o in choices if o.fmt is None or o.fmt.bits > 2) or choices
            for path, choices in options.items()
        },
        "scores to the power 0.8": {
            path: tuple(Option(o.fmt, o.nbytes, o.divergence**0.8) for o in choices)
            for path, choices in options.items()
        },
        "outside the blocks counted double": {
            path: tuple(
                Option(o.fmt, o.nbytes, o.divergence * (1 if any(part.isdigit() for part in path.split(".")) else 2))
                for o in choices
            )
            for path, choices in options.items()
        },
    }
    for name, choices in narrowed.items():
        if sum(min(o.nbytes for o in c) for c in choices.values()) <= room:
            rivals.append(rival(name, allocate(choices, room).formats))
    simple = [
        rival(f"uniform {fmt}", {path: fmt if (path, fmt) in nbytes else None for path in options})
        for fmt in dict.fromkeys(o.fmt for choices in options.values() for o in choices if o.fmt)
    ]
    simple += [
        rival(name, {path: preset.get(path) for path in options})
        for name, preset in presets.items()
        if all((path, preset.get(path)) in nbytes for path in options)
    ]
    simple.sort(key=lambda each: each.nbytes)
    fitting = [each for each in simple if each.nbytes <= room]
    # Asked for 4.5 bits, a person compares with uniform 4-bit, which takes a little more.
    over = [each for each in simple if room < each.nbytes <= room * (1 + SAME_SIZE)]
    kept: list[_Rival] = []
    for each in [*rivals, *fitting[-2:], *over[:1]]:
        if all(each.formats != other.formats for other in kept):
            kept.append(each)
    return kept


def _winner(measured: Sequence[Sequence[float]], fits: Sequence[bool]) -> int:
    """The first, unless another that fits is better beyond the paired confidence interval; then the best of those."""
    best, least = 0, stats.fmean(measured[0])
    for index, sequences in enumerate(measured[1:], start=1):
        differences = [ours - first for ours, first in zip(sequences, measured[0], strict=True)]
        mean, error = _mean_and_error(differences)
        if fits[index] and mean + PAIRED_ERRORS * error < 0 and stats.fmean(sequences) < least:
            best, least = index, stats.fmean(sequences)
    return best


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over sequences."""
    error = stats.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return stats.fmean(values), error


def _as_allocation(options: Mapping[str, tuple[Option, ...]], formats: Assignment, room: int) -> Allocation:
    """``formats`` as an allocation under the scores, with the bound that any has to live with."""
    bound = allocate(options, room).bound
    chosen = [next(o for o in choices if o.fmt == formats[path]) for path, choices in options.items()]
    return Allocation(dict(formats), sum(o.nbytes for o in chosen), sum(o.divergence for o in chosen), bound)


def _curve(draft: Plan, options: Mapping[str, tuple[Option, ...]], fixed: int) -> Iterator[CurvePoint]:
    """Predicted KL of the best assignment at sizes from the smallest to all at the most bits, evenly."""
    quantized = {path: [o for o in choices if o.fmt] for path, choices in options.items()}
    low = sum(min(o.nbytes for o in choices) for choices in quantized.values())
    high = sum(max(o.nbytes for o in choices) for choices in quantized.values())
    budgets = sorted({low + (high - low) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)})
    for allocation in frontier(quantized, budgets):
        total = fixed + allocation.nbytes
        yield CurvePoint(total, total * 8 / draft.parameter_count, allocation.divergence, None, None)


def next_bytes(spending: Spending, more: int) -> Allocation:
    """The best allocation with ``more`` bytes on top of the budget."""
    return allocate(spending.options, spending.budget_bytes - spending.fixed_bytes + more)
