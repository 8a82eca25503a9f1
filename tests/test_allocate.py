"""The allocation must fit, be as good as exhaustive search, and never claim a bound that can be beaten."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.budget.allocate import Option, allocate, frontier, useful
from mlxq.errors import BadInputError
from mlxq.methods.formats import Format

FORMATS = (Format(3, 64), Format(4, 64), Format(6, 64), None)


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[Option]], int]:
    modules = {
        f"layer.{index}": [
            Option(fmt, draw(st.integers(1, 4000)), draw(st.floats(0, 2, allow_subnormal=False))) for fmt in FORMATS
        ]
        for index in range(draw(st.integers(1, 5)))
    }
    smallest = sum(min(o.nbytes for o in options) for options in modules.values())
    return modules, smallest + draw(st.integers(0, 8000))


@given(problems())
@settings(max_examples=60, deadline=None)
def test_against_exhaustive_search(problem: tuple[dict[str, list[Option]], int]) -> None:
    modules, budget = problem
    result = allocate(modules, budget)
    best = min(
        sum(o.divergence for o in picks)
        for picks in itertools.product(*modules.values())
        if sum(o.nbytes for o in picks) <= budget
    )
    chosen = [next(o for o in modules[path] if o.fmt == fmt) for path, fmt in result.formats.items()]
    assert sum(o.nbytes for o in chosen) == result.nbytes <= budget
    assert sum(o.divergence for o in chosen) == pytest.approx(result.divergence)
    # Bytes here are below the programme's resolution, so it is exact.
    assert result.divergence == pytest.approx(best, abs=1e-9)
    assert result.bound <= best + 1e-9


def many_modules() -> dict[str, list[Option]]:
    """Modules of unlike sizes and sensitivities, whose divergence falls about fourfold with each bit."""
    modules: dict[str, list[Option]] = {}
    for index in range(210):
        size = (330_000, 110_000, 880_000)[index % 3]
        worth = 0.001 * (1 + (index * 37 % 50))
        modules[f"layer.{index}"] = [
            Option(Format(bits, group), int(size * (bits + 32 / group) / 8), worth * 4.0**-bits * (1 + group / 256))
            for bits in (2, 3, 4, 5, 6, 8)
            for group in (32, 64)
        ]
    return modules


@pytest.mark.parametrize("bpw", [3.2, 3.5, 4.25, 5.0, 6.1])
def test_lands_on_the_budget_with_a_small_gap(bpw: float) -> None:
    modules = many_modules()
    size = sum((330_000, 110_000, 880_000)[index % 3] for index in range(210))
    budget = int(size * bpw / 8)
    result = allocate(modules, budget)
    assert 0.995 * budget <= result.nbytes <= budget
    assert 0 <= result.gap < 0.002


def test_frontier_falls() -> None:
    points = frontier(many_modules(), [60_000_000, 10, 50_000_000, 40_000_000])
    assert [point.nbytes for point in points] == sorted(point.nbytes for point in points)
    assert len(points) == 3
    assert points[0].divergence > points[1].divergence > points[2].divergence


def test_a_budget_below_the_smallest_says_so() -> None:
    with pytest.raises(BadInputError, match="smallest formats allowed take 100 bytes, the budget is 99"):
        allocate({"a": [Option(Format(4, 64), 100, 0.1)]}, 99)


def test_more_than_enough_takes_the_best() -> None:
    options = [Option(Format(4, 64), 100, 0.1), Option(None, 400, 0.0)]
    result = allocate({"a": options}, 10_000)
    assert (result.formats["a"], result.gap) == (None, 0.0)


def test_useful_drops_what_costs_more_and_serves_worse() -> None:
    cheap, worse, best = Option(FORMATS[0], 10, 0.5), Option(FORMATS[1], 20, 0.6), Option(FORMATS[2], 30, 0.1)
    assert useful([best, worse, cheap]) == [cheap, best]
