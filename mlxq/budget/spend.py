"""A budget spent: formats for the modules that no rule decides, chosen by score and checked by measurement."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlxq.architecture.kv_cache import activation_bytes, kv_cache_bytes
from mlxq.budget.allocate import Allocation, Option, allocate, frontier
from mlxq.budget.rivals import Rival, mean_and_error, rivals, winner
from mlxq.budget.scoring import (
    Decoder,
    Remark,
    Scoring,
    allowed_formats,
    module_bytes,
    score_by_weights,
    score_on_text,
    scored_options,
)
from mlxq.calibration.cache import ScoreCache, scores_key
from mlxq.calibration.measured import Assignment, measured_divergences
from mlxq.calibration.streamed import StreamedModel, streamed_model
from mlxq.calibration.text import TextInfo
from mlxq.calibration.tokens import calibration_text
from mlxq.errors import BadInputError
from mlxq.machine.devices import find_device, this_machine
from mlxq.machine.memory import weight_room
from mlxq.methods.formats import Format
from mlxq.planning.plan import By, Plan
from mlxq.recipe.model import Budget

# Points of the size-KL curve, and how many of them are measured.
CURVE_POINTS = 13
MEASURED_POINTS = 4


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
            "text": None if self.text is None else self.text.facts(),
            "checks": [vars(check) for check in self.checks],
            "curve": [vars(point) for point in self.curve],
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Question:
    """What is to be decided: the formats allowed by module, what all else takes, and the most bytes of both."""

    draft: Plan
    budget: Budget
    formats: Mapping[str, tuple[Format, ...]]
    fixed_bytes: int
    most_bytes: int

    @property
    def free_bytes(self) -> int:
        """What is left for the modules to be decided."""
        return self.most_bytes - self.fixed_bytes


def spend(
    draft: Plan, presets: Mapping[str, Assignment], *, measure_curve: bool = False
) -> Iterator[Scoring | Remark | Spending]:
    """Choose formats for the modules of ``draft`` that its budget decides; the last item is the Spending.

    ``draft`` has those modules unquantized. ``presets`` are simpler assignments, by name, to be beaten on held-out
    text. Raises BadInputError where even the smallest options exceed the budget.
    """
    began = time.perf_counter()
    question = _question(draft)
    if draft.calibration.has_text:
        with streamed_model(draft.source, draft.architecture) as streamed:
            spending = yield from _spent_on_text(question, streamed, presets, measure_curve=measure_curve)
    else:
        scored = dict(score_by_weights(draft, question.formats))
        options = scored_options(draft, question.formats, scored)
        spending = _spending(question, options, allocate(options, question.free_bytes))
    yield replace(spending, seconds=time.perf_counter() - began)


def _question(draft: Plan) -> _Question:
    budget = draft.recipe.budget
    assert budget is not None
    formats = allowed_formats(draft)
    if not formats:
        raise BadInputError("rules decide every module, so the budget has nothing to decide", "Remove it, or a rule.")
    fixed = draft.weight_bytes - sum(module_bytes(draft, path, None) for path in formats)
    question = _Question(draft, budget, formats, fixed, budget_bytes(draft, budget))
    _check_smallest(question)
    return question


def _check_smallest(question: _Question) -> None:
    draft, most = question.draft, question.most_bytes
    smallest = question.fixed_bytes + sum(
        min(module_bytes(draft, path, fmt) for fmt in choices) for path, choices in question.formats.items()
    )
    if smallest > most:
        bpw = smallest * 8 / draft.parameter_count
        raise BadInputError(
            f"the budget of {question.budget} leaves {max(most, 0) / 1e6:,.1f} MB for the weights, "
            f"and the smallest options take {smallest / 1e6:,.1f} MB ({bpw:.2f} bits per weight)",
            "Raise the budget, add smaller options, or let fewer rules fix formats.",
        )


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


def _spending(question: _Question, options: Mapping[str, tuple[Option, ...]], allocation: Allocation) -> Spending:
    """A budget spent by scores alone, nothing measured and no time taken yet."""
    return Spending(
        budget=question.budget,
        budget_bytes=question.most_bytes,
        fixed_bytes=question.fixed_bytes,
        parameter_count=question.draft.parameter_count,
        options=options,
        allocation=allocation,
        text=None,
        checks=(),
        curve=tuple(_curve(question, options)),
        seconds=0.0,
    )


def _spent_on_text(
    question: _Question, streamed: StreamedModel, presets: Mapping[str, Assignment], *, measure_curve: bool
) -> Generator[Scoring | Remark, None, Spending]:
    """Score on calibration text, hold the best allocation against rivals on held-out text, and keep the winner."""
    draft = question.draft
    text = calibration_text(draft.calibration, streamed)
    cache = ScoreCache(scores_key(draft, text.info.ids_sha256, sum(batch.size for batch in text.batches)))
    if cache.remark is not None:
        yield Remark(cache.remark)
    yield from score_on_text(draft, streamed, text, question.formats, cache)
    options = scored_options(draft, question.formats, cache.scores)
    compared = rivals(options, question.free_bytes, presets)
    decoder = Decoder(draft, cache)

    def measured(assignments: Sequence[Assignment], stage: str) -> Generator[Scoring, None, list[list[float]]]:
        for step in measured_divergences(streamed, text.held_out, assignments, decoder.decoded):
            if isinstance(step, list):
                return step
            yield Scoring(stage, step, len(streamed.sequence.blocks))
        raise AssertionError("measuring ends with what was measured")

    found = yield from measured([rival.formats for rival in compared], "checking")
    best = winner(found, [rival.nbytes <= question.free_bytes for rival in compared])
    allocation = _as_allocation(options, compared[best].formats, question.free_bytes)
    spending = replace(
        _spending(question, options, allocation),
        text=text.info,
        checks=tuple(_checks(question, compared, found, best)),
    )
    if not measure_curve:
        return spending
    picks = [spending.curve[i * (len(spending.curve) - 1) // (MEASURED_POINTS - 1)] for i in range(MEASURED_POINTS)]
    assignments = [allocate(options, point.weight_bytes - question.fixed_bytes).formats for point in picks]
    at_picks = yield from measured(assignments, "measuring the curve")
    return replace(spending, curve=_with_measured(spending.curve, picks, at_picks))


def _checks(
    question: _Question, compared: Sequence[Rival], measured: Sequence[Sequence[float]], best: int
) -> Iterator[Check]:
    for index, (rival, sequences) in enumerate(zip(compared, measured, strict=True)):
        yield Check(
            rival.name,
            question.fixed_bytes + rival.nbytes,
            *mean_and_error(sequences),
            chosen=index == best,
            fits=rival.nbytes <= question.free_bytes,
        )


def _as_allocation(options: Mapping[str, tuple[Option, ...]], formats: Assignment, most_bytes: int) -> Allocation:
    """``formats`` as an allocation under the scores, with the bound that any has to live with."""
    bound = allocate(options, most_bytes).bound
    chosen = [next(o for o in choices if o.fmt == formats[path]) for path, choices in options.items()]
    return Allocation(dict(formats), sum(o.nbytes for o in chosen), sum(o.divergence for o in chosen), bound)


def _curve(question: _Question, options: Mapping[str, tuple[Option, ...]]) -> Iterator[CurvePoint]:
    """Predicted KL of the best assignment at sizes from the smallest to all at the most bits, evenly."""
    quantized = {path: [o for o in choices if o.fmt] for path, choices in options.items()}
    low = sum(min(o.nbytes for o in choices) for choices in quantized.values())
    high = sum(max(o.nbytes for o in choices) for choices in quantized.values())
    budgets = sorted({low + (high - low) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)})
    for allocation in frontier(quantized, budgets):
        total = question.fixed_bytes + allocation.nbytes
        yield CurvePoint(total, total * 8 / question.draft.parameter_count, allocation.divergence, None, None)


def _with_measured(
    curve: Sequence[CurvePoint], picks: Sequence[CurvePoint], measured: Sequence[Sequence[float]]
) -> tuple[CurvePoint, ...]:
    """The curve with what was measured at ``picks``, by sequence."""
    found = {point.weight_bytes: mean_and_error(values) for point, values in zip(picks, measured, strict=True)}
    none = (None, None)
    return tuple(
        CurvePoint(p.weight_bytes, p.bits_per_weight, p.predicted_kl, *found.get(p.weight_bytes, none)) for p in curve
    )


def next_bytes(spending: Spending, more: int) -> Allocation:
    """The best allocation with ``more`` bytes on top of the budget."""
    return allocate(spending.options, spending.budget_bytes - spending.fixed_bytes + more)
