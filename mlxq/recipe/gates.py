"""Quality gates: ``kl_mean<0.05``, ``size_bytes<2.2GB``, ``top1_agreement>=0.95``."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlxq.errors import BadInputError
from mlxq.metrics.metric import METRICS
from mlxq.tensors import BYTE_UNITS

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_LONGEST_GATE = 200  # characters
_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_GATE = re.compile(rf"\s*(\w+)\s*(<=|>=|<|>)\s*({_NUMBER})\s*([A-Za-z]+|%)?\s*")


@dataclass(frozen=True)
class Gate:
    """``metric`` must stand in ``relation`` to ``limit`` (sizes: bytes). ``text`` as it was written."""

    metric: str
    relation: str
    limit: float
    text: str


@dataclass(frozen=True)
class GateResult:
    """Whether a model met a gate. ``value`` is None where the metric was not measured."""

    gate: Gate
    model: str
    value: float | None
    passed: bool

    def __str__(self) -> str:
        found = "was not measured" if self.value is None else f"is {self.value:g}"
        return f"{self.model}: {self.gate.metric} {found}; the gate is {self.gate.text}"


def parse_gate(text: str) -> Gate:
    """Read one gate. Sizes take B, KB, MB, GB, TB (powers of ten) and KiB... (powers of two); pure numbers
    take %.

    Raises BadInputError for an unknown metric (naming the closest), a relation or a unit that does not fit.
    """
    shown = text if len(text) <= _LONGEST_GATE else text[:_LONGEST_GATE] + "..."
    match = _GATE.fullmatch(text) if shown == text else None
    if match is None:
        raise BadInputError(f"cannot read the gate {shown!r}", "Write METRIC<NUMBER, such as kl_mean<0.05.")
    metric, relation, number, unit = match.groups()
    if metric not in METRICS:
        close = difflib.get_close_matches(metric, METRICS, 1, cutoff=0)[0]
        known = f"Metrics: {', '.join(METRICS)}."
        raise BadInputError(f"gate {text!r}: unknown metric {metric!r}; the closest is {close}", known)
    limit = _limit(float(number), unit, metric, text)
    if math.isinf(limit):
        raise BadInputError(f"gate {text!r}: no number is that large, so it would decide nothing")
    return Gate(metric, relation, limit, text.strip())


def gate_fault(text: str) -> str | None:
    """Say what is wrong with a gate, or None."""
    try:
        parse_gate(text)
    except BadInputError as error:
        return f"{error.message}. {error.hint}" if error.hint else error.message
    return None


def _limit(number: float, unit: str | None, metric: str, text: str) -> float:
    """The limit in the metric's own unit."""
    if unit is None:
        return number
    if unit == "%" and not METRICS[metric].unit:
        return number / 100
    if METRICS[metric].unit == "bytes" and unit.upper() in BYTE_UNITS:
        return number * BYTE_UNITS[unit.upper()]
    takes = {"bytes": "B, KB, MB, GB, TB or KiB, MiB, GiB, TiB", "": "% or none"}
    allowed = takes.get(METRICS[metric].unit, "none")
    raise BadInputError(f"gate {text!r}: unit {unit!r} does not fit {metric}", f"Units it takes: {allowed}.")


def check_gate(gate: Gate, model: str, metrics: Mapping[str, float | None]) -> GateResult:
    """Hold one model's metrics against a gate. NaN, and a metric that was not measured, fail."""
    value = metrics.get(gate.metric)
    # Every comparison with NaN is false, so NaN fails whichever way the gate points.
    passed = value is not None and _OPERATORS[gate.relation](value, gate.limit)
    return GateResult(gate, model, value, passed)


def check_gates(gates: Sequence[Gate], models: Mapping[str, Mapping[str, float | None]]) -> tuple[GateResult, ...]:
    """Every gate against every model (name -> metrics), model by model."""
    return tuple(check_gate(gate, name, metrics) for name, metrics in models.items() for gate in gates)
