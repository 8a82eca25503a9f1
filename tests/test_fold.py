"""Folding of repeated layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlxq.fold import fold, ranges


def test_layers_with_equal_attributes_fold() -> None:
    rows = [("model.embed_tokens", 1)]
    rows += [(f"model.layers.{i}.mlp.down_proj", 6 if i < 2 else 4) for i in range(5)]
    folded = fold(rows)
    assert [(f.path, f.attributes, f.count) for f in folded] == [
        ("model.embed_tokens", 1, 1),
        ("model.layers.{0-1}.mlp.down_proj", 6, 2),
        ("model.layers.{2-4}.mlp.down_proj", 4, 3),
    ]
    assert folded[1].members == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def test_gaps_and_order_of_appearance() -> None:
    rows = [(f"layers.{i}.a", "x") for i in (11, 0, 1, 9, 2, 3, 7, 10)] + [("head", "x")]
    assert [f.path for f in fold(rows)] == ["layers.{0-3,7,9-11}.a", "head"]


def test_only_the_first_number_is_the_layer() -> None:
    rows = [(f"layers.{i}.block.{j}.a", None) for i in range(2) for j in range(2)]
    assert [f.path for f in fold(rows)] == ["layers.{0-1}.block.0.a", "layers.{0-1}.block.1.a"]


def test_a_single_layer_keeps_its_name() -> None:
    assert fold([("layers.3.a", None)])[0].path == "layers.3.a"
    assert [f.path for f in fold([("layers.0", 1), ("layers.1", 1)])] == ["layers.{0-1}"]


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_name_exactly_their_numbers(numbers: set[int]) -> None:
    found: set[int] = set()
    for part in ranges(sorted(numbers)).split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == numbers


@given(st.lists(st.tuples(st.sampled_from(["a.0.b", "a.1.b", "a.01.b", "a", "0", "1.c"]), st.integers(0, 1))))
def test_folding_loses_no_row(rows: list[tuple[str, int]]) -> None:
    folded = fold(rows)
    assert sorted((path, f.attributes) for f in folded for path in f.members) == sorted(rows)
    assert sum(f.count for f in folded) == len(rows)
