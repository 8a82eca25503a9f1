"""The allocation must fit, be as good as exhaustive search, and never claim a bound that can be beaten."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.budget import allocate as module
from mlxq.budget.allocate import Allocation, Option, allocate, frontier, lower_bound, useful
from mlxq.errors import BadInputError
from mlxq.methods.formats import Format

FORMATS = (Format(3, 64), Format(4, 64), Format(6, 64), None)
MODULES = 96


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
@settings(max_examples=40, deadline=None)
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
    for index in range(MODULES):
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
    size = sum((330_000, 110_000, 880_000)[index % 3] for index in range(MODULES))
    budget = int(size * bpw / 8)
    result = allocate(modules, budget)
    assert 0.995 * budget <= result.nbytes <= budget
    assert 0 <= result.gap < 0.004


def test_frontier_falls() -> None:
    points = frontier(many_modules(), [28_000_000, 10, 23_000_000, 18_000_000])
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


def test_of_equal_bytes_the_better_is_kept_and_of_equal_divergence_the_smaller() -> None:
    better, worse, larger = Option(FORMATS[0], 10, 0.2), Option(FORMATS[1], 10, 0.5), Option(FORMATS[2], 30, 0.2)
    assert useful([larger, worse, better]) == [better]


def test_the_bound_is_the_relaxed_problems_value() -> None:
    """Half of the step from 1.0 to 0.0 is paid for: relaxed, half of it is had."""
    steps = {"a": [Option(FORMATS[0], 100, 1.0), Option(None, 200, 0.0)]}
    assert lower_bound(steps, 150) == pytest.approx(0.5)
    assert lower_bound(steps, 175) == pytest.approx(0.25)
    assert lower_bound(steps, 100) == pytest.approx(1.0)
    assert lower_bound(steps, 200) == 0.0
    assert lower_bound(steps, 1000) == 0.0
    # The dearest step is the last to be taken: of the others each pays for itself first.
    two = {**steps, "b": [Option(FORMATS[0], 100, 10.0), Option(None, 200, 0.0)]}
    assert lower_bound(two, 300) == pytest.approx(1.0)
    assert lower_bound(two, 250) == pytest.approx(6.0)
    # Prices far from one another: what a byte saves is counted in units from 1e-9 up.
    dear = {"a": [Option(FORMATS[0], 1, 1e6), Option(None, 2, 0.0)], "b": [Option(FORMATS[0], 100, 1.0)]}
    assert lower_bound(dear, 101) == pytest.approx(1e6 + 1)


def test_the_gap_is_the_share_above_the_bound() -> None:
    assert Allocation({}, 0, 1.1, 1.0).gap == pytest.approx(0.1)
    assert Allocation({}, 0, 0.9, 1.0).gap == 0.0
    assert Allocation({}, 0, 0.0, 0.0).gap == 0.0


def test_what_is_left_over_buys_the_upgrade_that_gains_most_per_byte() -> None:
    small, large = Option(FORMATS[0], 100, 1.0), Option(FORMATS[1], 200, 0.5)
    modules = {
        "a": [small, large],
        "b": [Option(FORMATS[0], 100, 1.0), Option(FORMATS[1], 150, 0.6), Option(None, 400, 0.0)],
    }
    chosen = {"a": small, "b": modules["b"][0]}

    def filled(budget: int) -> dict[str, int]:
        return {path: option.nbytes for path, option in module._fill(modules, dict(chosen), budget).items()}

    assert filled(200) == {"a": 100, "b": 100}
    assert filled(250) == {"a": 100, "b": 150}
    assert filled(349) == {"a": 100, "b": 150}
    assert filled(350) == {"a": 200, "b": 150}
    assert filled(599) == {"a": 200, "b": 150}
    assert filled(600) == {"a": 200, "b": 400}
    assert chosen == {"a": small, "b": modules["b"][0]}, "what was handed in stays as it was"


def test_an_upgrade_is_never_for_the_worse() -> None:
    modules = {"a": [Option(FORMATS[0], 100, 0.1), Option(FORMATS[1], 150, 0.1), Option(FORMATS[2], 180, 0.2)]}
    assert module._fill(modules, {"a": modules["a"][0]}, 1000) == {"a": modules["a"][0]}


@pytest.mark.parametrize("scale", [1, 1000])
def test_rounded_bytes_never_exceed_the_budget_and_cost_little(scale: int) -> None:
    """Bytes are counted in units of the slack / RESOLUTION, always rounded up, and what that leaves is spent."""
    modules = {
        f"layers.{index}": [
            Option(fmt, scale * size + index * 7 % 5, worth / (rank + 1))
            for rank, (fmt, size) in enumerate(zip(FORMATS, (300, 401 + index, 617 - index, 1600), strict=True))
        ]
        for index, worth in enumerate((1.0, 3.0, 0.2, 5.0, 2.2, 0.9))
    }
    for budget in (2300 * scale, 3210 * scale, 4999 * scale, 7200 * scale):
        result = allocate(modules, budget)
        best = min(
            sum(o.divergence for o in picks)
            for picks in itertools.product(*modules.values())
            if sum(o.nbytes for o in picks) <= budget
        )
        assert result.nbytes <= budget
        assert best - 1e-9 <= result.divergence <= best * 1.002


def test_a_coarse_unit_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESOLUTION", 4)
    modules = {name: [Option(FORMATS[0], 100, 1.0), Option(FORMATS[1], 190, 0.1)] for name in "abcd"}
    # 320 bytes of slack in units of 80: each upgrade takes two units rounded up, filling finds room for the third.
    result = allocate(modules, 720)
    assert result.nbytes == 670
    assert result.divergence == pytest.approx(1.3)


def test_the_frontier_starts_at_the_smallest_assignment() -> None:
    modules = {"a": [Option(FORMATS[0], 100, 1.0), Option(FORMATS[1], 200, 0.0)], "b": [Option(FORMATS[0], 50, 1.0)]}
    assert [point.nbytes for point in frontier(modules, [250, 149, 150])] == [150, 250]
