"""What an allocation is held against, and when it gives way: on made-up scores and measurements."""

from __future__ import annotations

import pytest

from mlxq.budget.allocate import Option, allocate
from mlxq.budget.rivals import PAIRED_ERRORS, SAME_SIZE, Rival, mean_and_error, rivals, winner
from mlxq.methods.formats import Format

TWO, THREE, FOUR, SIX, EIGHT = (Format(bits, 64) for bits in (2, 3, 4, 6, 8))
BITS = {TWO: 2, THREE: 3, FOUR: 4, SIX: 6, EIGHT: 8, None: 16}


def choices(
    worth: float, size: int = 100, formats: tuple[Format | None, ...] = (TWO, FOUR, EIGHT, None)
) -> tuple[Option, ...]:
    """Options of ``size`` bytes a bit, whose divergence falls fourfold with each bit from ``worth``."""
    return tuple(Option(fmt, size * BITS[fmt], worth * 4.0 ** -BITS[fmt] if fmt else 0.0) for fmt in formats)


def named(found: list[Rival], name: str) -> Rival | None:
    return next((each for each in found if each.name == name), None)


def nbytes(options: dict[str, tuple[Option, ...]], formats: dict[str, Format | None]) -> int:
    return sum(o.nbytes for path, each in options.items() for o in each if o.fmt == formats[path])


EVEN = {"layers.0.a": choices(1.0), "layers.1.a": choices(1.0), "head": choices(1.0)}


def test_the_allocation_by_score_comes_first_and_its_bytes_are_its_own() -> None:
    found = rivals(EVEN, 1700, {})
    assert found[0].name == "by score"
    assert found[0].formats == allocate(EVEN, 1700).formats
    assert all(each.nbytes == nbytes(EVEN, dict(each.formats)) for each in found)


def test_no_assignment_is_measured_twice() -> None:
    found = rivals(EVEN, 1700, {"the same": allocate(EVEN, 1700).formats})
    assert named(found, "the same") is None
    assert len({tuple(sorted(each.formats.items(), key=str)) for each in found}) == len(found)


def test_groups_of_two_bits_are_doubted() -> None:
    """Where the scores take two bits somewhere, the variation without them does not."""
    uneven = {"layers.0.a": choices(9.0), "layers.1.a": choices(0.001, formats=(TWO, THREE, EIGHT, None))}
    found = rivals(uneven, 1050, {})
    assert found[0].formats["layers.1.a"] == TWO
    without = named(found, "no group of few bits")
    assert without is not None
    assert THREE in without.formats.values()
    assert TWO not in without.formats.values()


def test_what_has_two_bits_alone_keeps_them_and_what_stays_unquantized_may() -> None:
    only = {"layers.0.a": choices(1.0, formats=(TWO,)), "layers.1.a": choices(1.0, formats=(TWO, None))}
    found = rivals(only, 10_000, {})
    assert found[0].formats == {"layers.0.a": TWO, "layers.1.a": None}


def test_a_variation_that_does_not_fit_is_left_out() -> None:
    tight = sum(each[0].nbytes for each in EVEN.values())
    assert [each.name for each in rivals(EVEN, tight, {})] == ["by score"]


def test_a_variation_that_fits_to_the_byte_is_there() -> None:
    formats = (TWO, FOUR, SIX, None)
    options = {"layers.0.a": choices(100.0, formats=formats), "layers.1.a": choices(0.001, formats=formats)}
    found = rivals(options, 800, {})
    assert found[0].formats == {"layers.0.a": SIX, "layers.1.a": TWO}
    assert named(found, "no group of few bits") == Rival(
        "no group of few bits", {"layers.0.a": FOUR, "layers.1.a": FOUR}, 800
    )
    assert named(rivals(options, 799, {}), "no group of few bits") is None
    simple = {"turned": {"layers.0.a": TWO, "layers.1.a": SIX}}
    assert named(rivals(options, 800, simple), "turned") == Rival("turned", simple["turned"], 800)
    assert named(rivals(options, 790, simple), "turned") is None


def test_scores_are_flattened_and_what_lies_outside_the_blocks_counts_double() -> None:
    """One step of 100 bytes more goes to the larger gain; either variation turns to another module."""
    options = {
        "layers.0.a": (Option(FOUR, 100, 1.00), Option(EIGHT, 200, 0.0)),
        "head": (Option(FOUR, 100, 0.60), Option(EIGHT, 200, 0.0)),
    }
    found = rivals(options, 300, {})
    assert found[0].formats == {"layers.0.a": EIGHT, "head": FOUR}
    doubled = named(found, "outside the blocks counted double")
    assert doubled is not None
    assert doubled.formats == {"layers.0.a": FOUR, "head": EIGHT}
    # A steep score bought by many bytes against several shallow ones: flattening favours the shallow.
    steep = {
        "layers.0.a": (Option(FOUR, 100, 1.0), Option(EIGHT, 300, 0.0)),
        "layers.0.b": (Option(FOUR, 100, 0.48), Option(EIGHT, 200, 0.0)),
        "layers.0.c": (Option(FOUR, 100, 0.48), Option(EIGHT, 200, 0.0)),
    }
    found = rivals(steep, 500, {})
    assert found[0].formats["layers.0.a"] == EIGHT
    flat = named(found, "scores to the power 0.8")
    assert flat is not None
    assert flat.formats == {"layers.0.a": FOUR, "layers.0.b": EIGHT, "layers.0.c": EIGHT}


def test_the_two_largest_uniform_assignments_that_fit_are_there() -> None:
    options = {
        "layers.0.a": choices(1.0, formats=(TWO, THREE, FOUR, EIGHT, None)),
        "layers.1.a": choices(50.0, formats=(TWO, THREE, FOUR, EIGHT, None)),
    }
    names = [each.name for each in rivals(options, 1100, {})]
    assert [name for name in names if name.startswith("uniform")] == ["uniform 3:64", "uniform 4:64"]


def test_a_module_that_cannot_take_a_uniform_format_stays_unquantized() -> None:
    options = {"layers.0.a": choices(1.0, formats=(TWO, FOUR, SIX, None)), "router": choices(1.0, 1, (EIGHT, None))}
    uniform = named(rivals(options, 620, {}), "uniform 4:64")
    assert uniform == Rival("uniform 4:64", {"layers.0.a": FOUR, "router": None}, 416)


def test_one_that_takes_a_little_more_is_measured_beside_them() -> None:
    """The smallest of those above the budget, and no more than the half percent above it."""
    size = nbytes(EVEN, dict.fromkeys(EVEN, FOUR))
    just = int(size / (1 + SAME_SIZE)) + 1
    assert named(rivals(EVEN, just, {}), "uniform 4:64") is not None
    assert named(rivals(EVEN, just - 2, {}), "uniform 4:64") is None
    # Of two in that range the smaller is there.
    options = {path: choices(1.0, 1000) for path in EVEN}
    options["head"] = (*options["head"], Option(Format(4, 32), 4001, 0.001))
    beside = {"larger": {**dict.fromkeys(EVEN, FOUR), "head": Format(4, 32)}}
    names = [each.name for each in rivals(options, 11_943, beside)]
    assert "uniform 4:64" in names
    assert "larger" not in names


def test_presets_count_where_every_module_can_take_them() -> None:
    preset = {"layers.0.a": FOUR, "layers.1.a": EIGHT, "head": FOUR, "elsewhere": TWO}
    found = named(rivals(EVEN, 1650, {"mixed": preset}), "mixed")
    assert found == Rival("mixed", {"layers.0.a": FOUR, "layers.1.a": EIGHT, "head": FOUR}, 1600)
    assert named(rivals(EVEN, 1650, {"mixed": {**preset, "head": THREE}}), "mixed") is None
    # What a preset does not name stays unquantized, where that is allowed.
    rest = named(rivals(EVEN, 2450, {"mixed": {"layers.0.a": FOUR, "layers.1.a": FOUR}}), "mixed")
    assert rest == Rival("mixed", {"layers.0.a": FOUR, "layers.1.a": FOUR, "head": None}, 2400)


def test_the_first_stays_unless_another_is_better_beyond_doubt() -> None:
    first = [0.10, 0.20, 0.30, 0.40]
    slightly = [0.09, 0.21, 0.29, 0.39]  # better on average, within the error
    surely = [each - 0.02 for each in first]
    assert winner([first], [True]) == 0
    assert winner([first, slightly], [True, True]) == 0
    assert winner([first, surely], [True, True]) == 1
    assert winner([first, surely], [True, False]) == 0, "what does not fit is never chosen"
    assert winner([first, [each + 0.02 for each in first]], [True, True]) == 0


def test_of_several_that_are_better_the_best_is_taken() -> None:
    first = [0.1, 0.2, 0.3]
    less, least = [each - 0.01 for each in first], [each - 0.05 for each in first]
    assert winner([first, less, least], [True] * 3) == 2
    assert winner([first, least, less], [True] * 3) == 1
    assert winner([first, least, list(least)], [True] * 3) == 1, "an equal one changes nothing"


@pytest.mark.parametrize(("scale", "expected"), [(0.97, 0), (1.03, 1)])
def test_the_interval_is_that_of_paired_differences(scale: float, expected: int) -> None:
    """Its width is PAIRED_ERRORS standard errors of the differences, however much the sequences differ."""
    spread = [0.01, -0.01, 0.005, -0.005]
    _, error = mean_and_error(spread)
    first = [1.0, 5.0, 9.0, 100.0]
    other = [value - scale * PAIRED_ERRORS * error + noise for value, noise in zip(first, spread, strict=True)]
    assert winner([first, other], [True, True]) == expected


def test_mean_and_error() -> None:
    assert mean_and_error([1.0, 3.0]) == pytest.approx((2.0, 1.0))
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, (5 / 3) ** 0.5 / 2))
    assert mean_and_error([0.25]) == (0.25, 0.0)
