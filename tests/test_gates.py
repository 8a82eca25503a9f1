from __future__ import annotations

import math

import pytest

from mlxq.errors import BadInputError
from mlxq.metrics.metric import METRICS
from mlxq.recipe.gates import Gate, GateResult, check_gate, check_gates, gate_fault, parse_gate


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("kl_mean<0.05", 0.05),
        ("kl_mean <= 5e-2", 0.05),
        ("size_bytes<2.2GB", 2.2e9),
        ("peak_memory_bytes<4GiB", 4 * 2**30),
        ("size_bytes<100", 100),
        ("top1_agreement>=95%", 0.95),
        ("generation_tps>20", 20),
        ("size_bytes<7B", 7),
        ("size_bytes<7KB", 7e3),
        ("size_bytes<7mb", 7e6),
        ("size_bytes<7TB", 7e12),
        ("size_bytes<3KiB", 3 * 2**10),
        ("size_bytes<3MiB", 3 * 2**20),
        ("size_bytes<3tib", 3 * 2**40),
        ("kl_mean<.5", 0.5),
        ("kl_mean<5.", 5),
        ("kl_mean<+1e+2", 100),
        ("kl_mean>-1.5E-1", -0.15),
        (" ppl_ratio < 101 % ", 1.01),
    ],
)
def test_gates_are_read_with_their_units(text: str, limit: float) -> None:
    assert parse_gate(text).limit == limit


def test_a_gate_keeps_what_was_written_without_the_blanks_around() -> None:
    assert parse_gate("  kl_mean <= 5e-2 ") == Gate("kl_mean", "<=", 0.05, "kl_mean <= 5e-2")


@pytest.mark.parametrize("text", ["", "kl_mean", "kl_mean==0.1", "kl_mean<", "kl_mean<abc", "<0.1", "kl_mean<0.1 0.2"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_gate(text)
    assert caught.value.message == f"cannot read the gate {text!r}"
    assert caught.value.hint == "Write METRIC<NUMBER, such as kl_mean<0.05."
    assert gate_fault(text) == f"cannot read the gate {text!r}. Write METRIC<NUMBER, such as kl_mean<0.05."


def test_unknown_metric_names_the_closest() -> None:
    with pytest.raises(BadInputError) as caught:
        parse_gate("top1_agrement>0.9")
    assert caught.value.message == (
        "gate 'top1_agrement>0.9': unknown metric 'top1_agrement'; the closest is top1_agreement"
    )
    assert caught.value.hint == "Metrics: " + ", ".join(METRICS) + "."
    # However far, one is named.
    assert "the closest is " in (gate_fault("x>1") or "")


@pytest.mark.parametrize(
    ("text", "unit", "metric", "takes"),
    [
        ("kl_mean<2GB", "GB", "kl_mean", "none"),
        ("size_bytes<2parsecs", "parsecs", "size_bytes", "B, KB, MB, GB, TB or KiB, MiB, GiB, TiB"),
        ("size_bytes<2%", "%", "size_bytes", "B, KB, MB, GB, TB or KiB, MiB, GiB, TiB"),
        ("load_s<10%", "%", "load_s", "none"),
        ("ppl_ratio<2GB", "GB", "ppl_ratio", "% or none"),
    ],
)
def test_a_unit_must_fit_its_metric(text: str, unit: str, metric: str, takes: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_gate(text)
    assert caught.value.message == f"gate {text!r}: unit {unit!r} does not fit {metric}"
    assert caught.value.hint == f"Units it takes: {takes}."


@pytest.mark.parametrize("text", ["kl_mean<1e999", "kl_mean>-1e999", "size_bytes<1e305TB"])
def test_a_limit_is_a_finite_number(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_gate(text)
    assert caught.value.message.startswith("gate 'kl_mean" if "kl" in text else "gate 'size_bytes")
    assert caught.value.message.endswith("no number is that large, so it would decide nothing")
    assert gate_fault(text) == caught.value.message


def test_what_is_too_long_to_be_a_gate_is_not_read() -> None:
    # Longer would take longer than anybody waits: a number can be split in as many ways as it has digits.
    longest = "kl_mean<0." + "1" * 190
    assert parse_gate(longest).limit == float("0." + "1" * 190)
    assert (
        gate_fault(longest + "1") == f"cannot read the gate '{longest}...'. Write METRIC<NUMBER, such as kl_mean<0.05."
    )


def test_a_gate_without_fault_has_none() -> None:
    assert gate_fault("kl_mean<0.05") is None


@pytest.mark.parametrize(
    ("text", "value", "passed"),
    [
        ("kl_mean<0.05", 0.049, True),
        ("kl_mean<0.05", 0.05, False),
        ("kl_mean<=0.05", 0.05, True),
        ("kl_mean<=0.05", 0.051, False),
        ("top1_agreement>=0.95", 0.94, False),
        ("top1_agreement>=0.95", 0.95, True),
        ("top1_agreement>0.95", 0.95, False),
        ("top1_agreement>0.95", 0.96, True),
        ("kl_mean<=0", 0.0, True),
    ],
)
def test_gates_decide(text: str, value: float, passed: bool) -> None:
    gate = parse_gate(text)
    other = dict.fromkeys(METRICS, -value)
    assert check_gate(gate, "A", {**other, gate.metric: value}) == GateResult(gate, "A", value, passed)


@pytest.mark.parametrize("relation", ["<", "<=", ">", ">="])
def test_nan_and_what_was_not_measured_fail_every_gate(relation: str) -> None:
    gate = parse_gate(f"kl_mean{relation}0.05")
    assert not check_gate(gate, "A", {"kl_mean": math.nan}).passed
    for metrics in ({"kl_mean": None}, {}, {"ppl": 0.0}):
        missing = check_gate(gate, "A", metrics)
        assert missing == GateResult(gate, "A", None, passed=False)
        assert str(missing) == f"A: kl_mean was not measured; the gate is kl_mean{relation}0.05"


def test_every_gate_is_held_against_every_model() -> None:
    gates = [parse_gate("kl_mean<0.1"), parse_gate("size_bytes<1MB")]
    models = {"A": {"kl_mean": 0.05, "size_bytes": 5e5}, "B": {"kl_mean": 0.2, "size_bytes": 4e5}}
    found = check_gates(gates, models)
    assert [(g.model, g.passed) for g in found] == [("A", True), ("A", True), ("B", False), ("B", True)]
    assert str(found[2]) == "B: kl_mean is 0.2; the gate is kl_mean<0.1"
