from __future__ import annotations

import math

import pytest

from mlxq.errors import BadInputError
from mlxq.recipe.gates import check_gate, check_gates, parse_gate


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
    ],
)
def test_gates_are_read_with_their_units(text: str, limit: float) -> None:
    assert parse_gate(text).limit == limit


@pytest.mark.parametrize("text", ["", "kl_mean", "kl_mean==0.1", "kl_mean<", "kl_mean<abc", "<0.1", "kl_mean<0.1 0.2"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(BadInputError, match="cannot read the gate"):
        parse_gate(text)


def test_unknown_metric_names_the_closest() -> None:
    with pytest.raises(BadInputError, match="the closest is top1_agreement"):
        parse_gate("top1_agrement>0.9")


@pytest.mark.parametrize("text", ["kl_mean<2GB", "size_bytes<2parsecs", "load_s<10%"])
def test_a_unit_must_fit_its_metric(text: str) -> None:
    with pytest.raises(BadInputError, match="does not fit"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "value", "passed"),
    [
        ("kl_mean<0.05", 0.049, True),
        ("kl_mean<0.05", 0.05, False),
        ("kl_mean<=0.05", 0.05, True),
        ("top1_agreement>=0.95", 0.94, False),
        ("top1_agreement>0.95", 0.96, True),
    ],
)
def test_gates_decide(text: str, value: float, passed: bool) -> None:
    metric = parse_gate(text).metric
    assert check_gate(parse_gate(text), "A", {metric: value}).passed is passed


@pytest.mark.parametrize("relation", ["<", "<=", ">", ">="])
def test_nan_and_what_was_not_measured_fail_every_gate(relation: str) -> None:
    gate = parse_gate(f"kl_mean{relation}0.05")
    assert not check_gate(gate, "A", {"kl_mean": math.nan}).passed
    missing = check_gate(gate, "A", {"kl_mean": None})
    assert not missing.passed
    assert "was not measured" in str(missing)


def test_every_gate_is_held_against_every_model() -> None:
    gates = [parse_gate("kl_mean<0.1"), parse_gate("size_bytes<1MB")]
    models = {"A": {"kl_mean": 0.05, "size_bytes": 5e5}, "B": {"kl_mean": 0.2, "size_bytes": 4e5}}
    found = check_gates(gates, models)
    assert [(g.model, g.passed) for g in found] == [("A", True), ("A", True), ("B", False), ("B", True)]
    assert str(found[2]) == "B: kl_mean is 0.2; the gate is kl_mean<0.1"
