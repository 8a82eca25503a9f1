from __future__ import annotations

import fnmatch
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxq.errors import BadInputError
from mlxq.methods.formats import Format
from mlxq.recipe.load import load_recipe
from mlxq.recipe.match import (
    assign,
    layer_index,
    matches,
    names_module,
    parse_layers,
    pattern_fault,
    slice_fault,
)
from mlxq.recipe.model import Rule

COMPONENTS = st.sampled_from(["model", "layers", "0", "7", "12", "mlp", "down_proj", "v_proj", "lm_head", "gate"])
PATHS = st.lists(COMPONENTS, min_size=1, max_size=6).map(".".join)
BOUNDS = st.one_of(st.none(), st.integers(-80, 80))


def rule(*patterns: str, layers: tuple[str, ...] | None = None, optional: bool = False, at: int = 1) -> Rule:
    return Rule(patterns, layers, Format(6, 64), optional, where=f"r.yaml:{at} rules[{at - 1}]")


def dense(count: int) -> list[str]:
    parts = ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.down_proj"]
    return [
        "model.embed_tokens",
        *(f"model.layers.{i}.{part}" for i in range(count) for part in parts),
        "lm_head",
    ]


@given(BOUNDS, BOUNDS, BOUNDS.filter(lambda step: step != 0), st.integers(0, 70))
def test_slices_are_pythons(start: int | None, stop: int | None, step: int | None, count: int) -> None:
    text = ":".join("" if bound is None else str(bound) for bound in (start, stop, step))
    assert parse_layers([text], count) == frozenset(range(count)[start:stop:step])


@given(st.integers(-80, 80), st.integers(0, 70))
def test_a_plain_integer_is_that_layer(index: int, count: int) -> None:
    expected = {range(count)[index]} if -count <= index < count else set()
    assert parse_layers([str(index)], count) == expected


@given(st.integers(1, 200))
def test_bounds_are_arithmetic_over_n(n: int) -> None:
    assert parse_layers(["n//8+2::3"], n) == frozenset(range(n)[n // 8 + 2 :: 3])
    assert parse_layers(["7*n//8:", "(n-1)//2"], n) == frozenset(range(n)[7 * n // 8 :]) | {(n - 1) // 2}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("a:", "'a' is not arithmetic over integers and n"),
        ("1:2:3:4", "it has more than three parts"),
        ("::0", "the step is zero"),
        ("n**9:", "'n**9' is not arithmetic over integers and n"),
        ("1.5:", "'1.5' is not arithmetic over integers and n"),
        ("True:", "'True' is not arithmetic over integers and n"),
        ("__import__('os'):", "\"__import__('os')\" is not arithmetic over integers and n"),
        ("n//0:", "it divides by zero where n is 1009"),
    ],
)
def test_bad_slices_say_why(text: str, why: str) -> None:
    assert slice_fault(text) == f"bad layer slice {text!r}: {why}"


def test_a_slice_cannot_grow_without_bound() -> None:
    assert slice_fault("9*" * 40 + "9") == "bad layer slice '9*9*9*9*9*9*9*9*9*9*...': it is longer than 64 characters"
    with pytest.raises(BadInputError):
        parse_layers(["(" * 60 + ":"], 4)


@given(PATHS, PATHS)
def test_a_literal_is_a_trailing_run_of_components(pattern: str, path: str) -> None:
    wanted, have = pattern.split("."), path.split(".")
    assert matches(pattern, path) == (have[-len(wanted) :] == wanted)


@given(PATHS, st.text(alphabet="*?[]!.mlp_v0", max_size=12).filter(lambda t: set(t) & set("*?[")))
def test_a_wildcard_is_a_glob_over_the_whole_path(path: str, pattern: str) -> None:
    assert matches(pattern, path) == fnmatch.fnmatchcase(path, pattern)


@given(PATHS, PATHS)
def test_a_regular_expression_matches_in_full(path: str, other: str) -> None:
    assert matches(f"re:{re.escape(path)}", path)
    assert matches(f"re:{re.escape(other)}", path) == (other == path)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.12.mlp.experts.3.up_proj", 12),
        ("lm_head", None),
        ("model.h2.x", None),
        ("a.²", None),
        ("3.b", 3),
    ],
)
def test_the_layer_is_the_first_number(path: str, layer: int | None) -> None:
    assert layer_index(path) == layer


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("lm_head", True),
        ("mlp.gate", True),
        ("*.mlp.gate", True),
        ("*", False),
        ("*_proj", False),
        ("*.gate*", False),
        ("re:.*mlp.gate", False),
    ],
)
def test_which_patterns_name_a_module(pattern: str, names: bool) -> None:
    assert names_module(pattern) is names


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("re:(", "bad regular expression '(': missing ), unterminated subpattern at position 0"),
        ("re:", "the regular expression is empty"),
        ("", "the pattern is empty"),
        (" lm_head", "pattern ' lm_head' has blanks around it"),
        ("*.[0-", "pattern '*.[0-' has a '[' without its ']'"),
        ("*.layers.[0-3].*", None),
    ],
)
def test_bad_patterns_say_why(pattern: str, fault: str | None) -> None:
    assert pattern_fault(pattern) == fault


def test_the_first_rule_decides_and_later_ones_are_named() -> None:
    rules = [rule("v_proj", layers=("0",)), rule("v_proj", "lm_head", at=2), rule("*_proj", at=3)]
    decided, faults = assign(rules, dense(2), 2, None)
    assert faults == ()
    by_path = {match.path: (match.rule, match.also) for match in decided}
    assert by_path["model.layers.0.self_attn.v_proj"] == (0, (1, 2))
    assert by_path["model.layers.1.self_attn.v_proj"] == (1, (2,))
    assert by_path["model.layers.1.mlp.down_proj"] == (2, ())
    assert by_path["lm_head"] == (1, ())
    assert by_path["model.embed_tokens"] == (None, ())
    assert [match.path for match in decided] == dense(2)


def test_a_pattern_that_matches_nothing_is_a_fault_with_the_closest_names() -> None:
    rules = [
        rule("down_prj"),
        rule("mlp.gate_prj", at=2),
        rule("v_proj", "zzz", at=3),
        rule("*.v_projj", at=4),
    ]
    _, faults = assign(rules, dense(2), 2, None)
    assert faults == (
        "r.yaml:1 rules[0]: 'down_prj' matches no module; closest: down_proj",
        "r.yaml:2 rules[1]: 'mlp.gate_prj' matches no module; closest: mlp.gate_proj, mlp.down_proj",
        "r.yaml:3 rules[2]: 'zzz' matches no module",
        "r.yaml:4 rules[3]: '*.v_projj' matches no module; closest: v_proj, q_proj, gate_proj",
    )


def test_layers_that_hold_nothing_are_a_fault() -> None:
    _, faults = assign([rule("v_proj", layers=("40",)), rule("lm_head", layers=(":4",), at=2)], dense(3), 3, None)
    assert faults == (
        "r.yaml:1 rules[0]: matches 3 modules, none in layers 40; the model has 3 layers, numbered from 0",
        "r.yaml:2 rules[1]: matches 1 module, none in layers :4; the model has 3 layers, numbered from 0",
    )


def test_a_slice_that_fails_on_this_model_is_a_fault() -> None:
    _, faults = assign([rule("v_proj", layers=("10//(n-3):",))], dense(3), 3, None)
    assert faults == ("r.yaml:1 rules[0]: bad layer slice '10//(n-3):': it divides by zero where n is 3",)


def test_optional_rules_may_match_nothing() -> None:
    rules = [rule("zzz", optional=True), rule("v_proj", layers=("40",), optional=True)]
    assert assign(rules, dense(3), 3, None)[1] == ()


def test_a_shadowed_rule_is_a_fault_that_says_by_which() -> None:
    rules = [rule("*_proj"), rule("lm_head", at=2), rule("v_proj", "lm_head", at=3)]
    _, faults = assign(rules, dense(2), 2, None)
    assert faults == (
        "r.yaml:3 rules[2]: never decides anything; all 3 modules it matches are taken by "
        "r.yaml:1 rules[0] (*_proj), r.yaml:2 rules[1] (lm_head), and the first match wins",
    )


def test_an_inherited_rule_may_be_overridden() -> None:
    child, parent = (
        rule("lm_head"),
        Rule(("lm_head",), None, Format(4, 64), False, "p.yaml:3 rules[0]", inherited=True),
    )
    assert assign([child, parent], dense(1), 1, None)[1] == ()


def test_only_the_literal_lm_head_means_the_tied_embedding() -> None:
    paths = dense(1)[:-1]
    tied = "model.embed_tokens"
    decided, faults = assign([rule("lm_head")], paths, 1, tied)
    assert faults == ()
    assert [match.path for match in decided if match.rule == 0] == [tied]
    for pattern in ("*lm_head*", "re:.*lm_head"):
        decided, _ = assign([rule(pattern, optional=True)], paths, 1, tied)
        assert all(match.rule is None for match in decided)


PRESET_PARTS = [
    "self_attn.qkv_proj",
    "self_attn.v_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.v_b_proj",
]
PRESET_PARTS += [
    "self_attn.v_a_proj",
    "self_attn.o_proj",
    "mlp.gate_up_down_proj",
    "mlp.down_proj",
    "mlp.up_proj",
]
PRESET_PARTS += ["mlp.switch_mlp.down_proj", "mlp.shared_experts.down_proj"]


@pytest.mark.parametrize("preset", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
@pytest.mark.parametrize("prefix", ["model", "language_model.model", "backbone"])
def test_mixed_presets_decide_as_mlx_lm(preset: str, prefix: str) -> None:
    convert = pytest.importorskip("mlx_lm.convert")
    recipe = load_recipe(preset)
    assert recipe.default is not None
    head = "language_model.lm_head" if prefix.startswith("language") else "lm_head"
    for n in range(2, 65):
        paths = [f"{prefix}.embed_tokens", head]
        paths += [f"{prefix}.layers.{i}.{part}" for i in range(n) for part in PRESET_PARTS]
        model = SimpleNamespace(named_modules=lambda paths=paths: [(path, None) for path in paths], layers=range(n))
        theirs = convert.mixed_quant_predicate_builder(preset, model)
        decided, faults = assign(recipe.rules, paths, n, tied_head=None)
        assert faults == ()
        for match in decided:
            ours = recipe.default if match.rule is None else recipe.rules[match.rule].format
            assert ours is not None
            if match.path.endswith("embed_tokens"):
                assert ours == recipe.default
            assert ours.as_config() == theirs(match.path, None), (n, match.path)
