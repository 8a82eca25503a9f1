from __future__ import annotations

import fnmatch
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxq.errors import BadInputError
from mlxq.methods.formats import Format
from mlxq.recipe.load import load_recipe
from mlxq.recipe.match import (
    Match,
    assign,
    check_pattern,
    layer_index,
    matches,
    matching,
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
        ("0in n:", "'0in n' is not arithmetic over integers and n"),
        ("n n", "'n n' is not arithmetic over integers and n"),
        ("-", "'-' is not arithmetic over integers and n"),
        ("n(3)", "'n(3)' is not arithmetic over integers and n"),
        ("4/2:", "'4/2' is not arithmetic over integers and n"),
        ("+4:", "'+4' is not arithmetic over integers and n"),
        ("1:é", "'é' is not arithmetic over integers and n"),
        ("1e9:", "'1e9' is not arithmetic over integers and n"),
        (" : : : ", "it has more than three parts"),
    ],
)
def test_bad_slices_say_why(text: str, why: str) -> None:
    assert slice_fault(text) == f"bad layer slice {text!r}: {why}"


@pytest.mark.parametrize(
    "text", [":", " 1 : 2 ", "(n - 1)", "-n//2::2", "2*(n+1)//3:", "n-n:3+4:5//2", "9" * 60 + "::1"]
)
def test_a_good_slice_has_no_fault(text: str) -> None:
    assert slice_fault(text) is None


@given(st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9), st.integers(1, 70))
def test_each_operator_is_pythons(a: int, b: int, c: int, n: int) -> None:
    bounds = [f"{a}+{b}", f"{a}-{b}", f"{a}*{b}", f"{a}//{c}", f"-({a}-n)", f"n-{c}", f"(n+{a})*{b}//{c}"]
    for bound in (*bounds, f"{a}+n", f"{a}*n", f"{a}//n"):
        value = eval(bound, {"n": n})
        assert parse_layers([bound], n) == ({range(n)[value]} if -n <= value < n else set())
        assert parse_layers([f"{bound}:"], n) == frozenset(range(n)[value:])


def test_selections_add_up() -> None:
    assert parse_layers(["0", "-1", "2:4"], 9) == {0, 8, 2, 3}
    assert parse_layers([], 9) == frozenset()


def test_a_bad_slice_comes_with_how_to_write_one() -> None:
    with pytest.raises(BadInputError) as caught:
        parse_layers(["a"], 4)
    assert caught.value.hint == 'write a Python slice such as ":4", "-4:" or "n//8+2::3"'


def test_layers_are_not_listed_however_many_a_config_claims() -> None:
    rules = [rule("v_proj", layers=(":", "7*n//8:")), rule("lm_head", layers=(":",), optional=True, at=2)]
    decided, faults = assign(rules, dense(2), 10**15, None)
    assert faults == ()
    assert [match.path for match in decided if match.rule == 0] == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    ]


def test_a_slice_cannot_grow_without_bound() -> None:
    longest = "9" * 63 + ":"
    assert slice_fault(longest) is None
    assert slice_fault(longest + "1") == f"bad layer slice '{'9' * 20}...': it is longer than 64 characters"
    assert slice_fault(":" * 65) == f"bad layer slice '{':' * 20}...': it is longer than 64 characters"
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
        ("a.03", 3),
        ("a.999999999", 999999999),
        ("a.1000000000", None),
        ("a." + "9" * 5000 + ".4", 4),
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
        ("lm_head ", "pattern 'lm_head ' has blanks around it"),
        (" ", "the pattern is empty"),
        ("*]*[a", "pattern '*]*[a' has a '[' without its ']'"),
        ("[]", None),
        ("[!a]", None),
        ("x" * 1000, None),
        ("x" * 1001, f"pattern '{'x' * 60}...' is longer than 1,000 characters"),
        ("re:" + "x" * 57, None),
        ("re:" + "(" * 30, f"bad regular expression '{'(' * 30}': missing ), unterminated subpattern at position 29"),
        (
            "re:" + "(" * 51 + "x" * 9,
            f"bad regular expression '{'(' * 51}{'x' * 6}...': its groups are nested more than 50 deep",
        ),
        ("re:" + "(" * 50 + ")" * 50, None),
        ("re:()" * 1 + "()" * 60, None),
        ("re:[[:alpha:]]", None),
        ("re:a{e}", "bad regular expression 'a{e}': a '{' that begins no repeat; put a backslash before it"),
        ("re:a{", "bad regular expression 'a{': a '{' that begins no repeat; put a backslash before it"),
        (r"re:a\{e}", None),
        ("re:a{2}b{2,}c{,2}d{2,3}", None),
    ],
)
def test_bad_patterns_say_why(pattern: str, fault: str | None) -> None:
    if pattern == "re:[[:alpha:]]":  # Python's own words
        assert (pattern_fault(pattern) or "").endswith("; put a backslash before it")
    else:
        assert pattern_fault(pattern) == fault


@pytest.mark.parametrize(
    "expression",
    [
        "a{100000000}",
        "(?:(?:(?:a?){1000}){1000}){1000}",
        "(?:a?){0,100000000}",
        "(?:a?){,100000000}",
        "a{99999999999999999999}",
        "x" * 100_001,
        "aa{200000}",
    ],
)
def test_an_expression_that_would_take_long_to_compile_is_refused(expression: str) -> None:
    shown = expression if len(expression) <= 57 else expression[:57] + "..."
    assert pattern_fault(f"re:{expression}") == (
        f"bad regular expression {shown!r}: it is too large, its repeats multiplied"
    )


@pytest.mark.parametrize(
    "expression", ["x" * 100_000, "a{90000}", r"(\w{1,64}\.){1,9}\w{1,64}", "a{0}b{0,0}c{1}" + "d" * 90_000]
)
def test_an_expression_of_a_size_that_people_write_is_not(expression: str) -> None:
    assert pattern_fault(f"re:{expression}") is None


EXPRESSIONS = [
    r".*\.(q|k)_proj",
    r"model\.layers\.(0|1)\..*",
    r"(?!.*lm_head).*",
    r".*(?<!gate)_proj",
    r"(\w+)\.\1",
    r"(?i)MODEL\..*\.V_PROJ",
    r".*\.\d{1,2}\.(?:mlp|self_attn)\.[a-z_]+",
    r"(?P<a>model)(?:\.\w+)*",
    r"lm_head|",
    r"lm",
    r".*_proj$",
    r"^.*[^d]$",
    r"(?s:.+?)(?x: m l p ).*",
    r"model[.]layers[.](?:[0-9]|1[0-5])[.].*",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
@settings(deadline=None)
@given(path=PATHS)
def test_an_expression_means_what_it_means_to_python(expression: str, path: str) -> None:
    assert pattern_fault(f"re:{expression}") is None
    paths = [path, *dense(2), "model.model", ""]
    meant = {each for each in paths if re.fullmatch(expression, each)}
    assert matching(f"re:{expression}", paths, "pattern") == meant


ENDLESS = [r"(a|a|.)*(.|.)*[^\w.]", r"(?:.|(?=.)|..)*[^\w.]", "(.*?)" * 6 + r"(?!x)[^\w.]"]


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_that_backtracks_for_ever_is_stopped(expression: str) -> None:
    paths = dense(80)
    shown = expression if len(expression) <= 57 else expression[:57] + "..."
    said = f"the regular expression {shown!r} takes too long to match a module's path"
    with pytest.raises(BadInputError) as caught:
        assign([rule("v_proj"), rule(f"re:{expression}", at=2)], paths, 80, None)
    assert caught.value.message == f"r.yaml:2 rules[1]: {said}"
    assert caught.value.hint == "Repeats inside repeats, such as (a+)+, do that; write it without."
    with pytest.raises(BadInputError) as caught:
        matching(f"re:{expression}", paths, "--why")
    assert caught.value.message == f"--why: {said}"


def test_expressions_share_the_time_they_may_take() -> None:
    # Each alone passes; a hundred of them may not take a hundred times as long.
    slow = [rule("re:" + "(.*?)" * 3 + rf"(?!{number})[^\w.]", optional=True) for number in range(100)]
    paths = [f"{'x' * 50}.{number}" for number in range(8)]
    for each in slow[:3]:
        assert assign([each], paths, 80, None)[1] == ()
    with pytest.raises(BadInputError, match="takes too long"):
        assign(slow, paths, 80, None)


def test_more_expressions_may_take_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxq.recipe.match._PATIENCE_S", 0.0)
    monkeypatch.setattr("mlxq.recipe.match._PATIENCE_PER_MATCH_S", 0.3)
    slow = [rule("re:" + "(.*?)" * 4 + rf"(?!{number})[^\w.]", "x", optional=True) for number in range(40)]
    assert assign(slow, ["x" * 50], 0, None)[1] == ()


def test_what_is_no_pattern_is_said_where_it_was_asked() -> None:
    for pattern in ("re:(", " x", ""):
        with pytest.raises(BadInputError) as caught:
            check_pattern(pattern, "--match")
        assert caught.value.message == f"--match: {pattern_fault(pattern)}"
        assert caught.value.hint == "docs/recipes.md has the patterns."
    check_pattern("*", "--match")
    with pytest.raises(BadInputError, match=r"^--why: bad regular expression"):
        matching("re:(", ["a"], "--why")
    with pytest.raises(BadInputError, match=r"^pattern: bad regular expression"):
        matches("re:(", "a")


def test_matching_gives_the_paths_that_are_meant() -> None:
    paths = dense(1)
    assert matching("v_proj", paths, "x") == {"model.layers.0.self_attn.v_proj"}
    assert matching("*proj", paths, "x") == {path for path in paths if path.endswith("proj")}
    assert matching("re:l.*", paths, "x") == {"lm_head"}
    assert matching("roj", paths, "x") == frozenset()


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


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("re:.*\\.v_projj", "; closest: v_proj, q_proj, gate_proj"),
        ("re:.*\\.(down_prj)", "; closest: down_proj"),
        ("model.layers.0.mlp.down_prj", "; closest: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj"),
        ("nowhere.at.all.lm_haed", "; closest: lm_head"),
        ("*.emb_tokens", "; closest: embed_tokens"),
        ("lmhead", "; closest: lm_head"),
        ("no.such.place.on.this.earth.down_prj", "; closest: down_proj"),
        ("re:(zzz|down_prj)", "; closest: down_proj"),
        ("re:.*", None),
        ("*.qqqqqq", ""),
        ("?", ""),
        ("v_projj" * 29, ""),
    ],
)
def test_the_closest_names_are_those_that_look_alike(pattern: str, near: str | None) -> None:
    _, faults = assign([rule(pattern)], dense(2), 2, None)
    shown = pattern if len(pattern) <= 60 else pattern[:60] + "..."
    if near is None:
        assert faults == ()
    elif pattern.startswith("model.layers"):
        assert faults[0].startswith(f"r.yaml:1 rules[0]: {shown!r} matches no module{near}")
    else:
        assert faults == (f"r.yaml:1 rules[0]: {shown!r} matches no module{near}",)


def test_close_names_are_not_those_of_the_marks_around() -> None:
    _, faults = assign([rule("re:q"), rule("*.LN_finale", at=2)], ["a.re", "model.LN_final"], 0, None)
    assert faults == (
        "r.yaml:1 rules[0]: 're:q' matches no module",
        "r.yaml:2 rules[1]: '*.LN_finale' matches no module; closest: LN_final",
    )


def test_close_names_are_looked_for_only_as_long_as_they_are_shown() -> None:
    _, faults = assign([rule("v_projj", at=at) for at in range(1, 31)], dense(2), 2, None)
    assert len(faults) == 30
    assert all(fault.endswith("matches no module; closest: v_proj, q_proj, gate_proj") for fault in faults[:20])
    assert all(fault.endswith("'v_projj' matches no module") for fault in faults[20:])


def test_layers_that_hold_nothing_are_a_fault() -> None:
    _, faults = assign([rule("v_proj", layers=("40",)), rule("lm_head", layers=(":4",), at=2)], dense(3), 3, None)
    assert faults == (
        "r.yaml:1 rules[0]: matches 3 modules, none in layers 40; the model has 3 layers, numbered from 0",
        "r.yaml:2 rules[1]: matches 1 module, none in layers :4; the model has 3 layers, numbered from 0",
    )
    _, faults = assign([rule("v_proj", layers=("3", "7:"))], dense(3), 3, None)
    assert faults == (
        "r.yaml:1 rules[0]: matches 3 modules, none in layers 3, 7:; the model has 3 layers, numbered from 0",
    )


def test_a_slice_that_fails_on_this_model_is_a_fault() -> None:
    _, faults = assign([rule("v_proj", layers=("10//(n-3):",))], dense(3), 3, None)
    assert faults == ("r.yaml:1 rules[0]: bad layer slice '10//(n-3):': it divides by zero where n is 3",)


def test_where_a_pattern_and_the_layers_both_fail_both_are_said() -> None:
    _, faults = assign([rule("zzz", "lm_head", layers=("a",))], dense(1), 1, None)
    assert faults == (
        "r.yaml:1 rules[0]: 'zzz' matches no module",
        "r.yaml:1 rules[0]: bad layer slice 'a': 'a' is not arithmetic over integers and n",
    )
    # Nothing matched: that no layer holds it goes without saying.
    _, faults = assign([rule("zzz", layers=("0",))], dense(1), 1, None)
    assert faults == ("r.yaml:1 rules[0]: 'zzz' matches no module",)


def test_layers_are_those_of_any_slice() -> None:
    decided, faults = assign([rule("v_proj", layers=("0", "-1:"))], dense(4), 4, None)
    assert faults == ()
    assert [layer_index(match.path) for match in decided if match.rule == 0] == [0, 3]


def test_a_rule_that_failed_takes_nothing_from_later_ones() -> None:
    rules = [rule("lm_head", layers=("0",), optional=True), rule("lm_head", at=2)]
    decided, faults = assign(rules, dense(1), 1, None)
    assert faults == ()
    assert [match for match in decided if match.path == "lm_head"] == [Match("lm_head", 1, ())]


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


def test_a_rule_shadowed_on_one_module_says_so() -> None:
    _, faults = assign([rule("lm_head"), rule("lm_head", optional=True, at=2)], dense(1), 1, None)
    assert faults == (
        "r.yaml:2 rules[1]: never decides anything; the module it matches is taken by "
        "r.yaml:1 rules[0] (lm_head), and the first match wins",
    )


def test_a_shadowed_rule_names_every_pattern_of_the_other() -> None:
    _, faults = assign([rule("lm_head", "v_proj"), rule("lm_head", at=2)], dense(1), 1, None)
    assert "taken by r.yaml:1 rules[0] (lm_head, v_proj), and" in faults[0]


def test_a_rule_that_decides_one_module_is_not_shadowed() -> None:
    decided, faults = assign([rule("*.v_proj", "lm_head"), rule("*_proj", "lm_head", at=2)], dense(1), 1, None)
    assert faults == ()
    assert {match.path: match.also for match in decided}["lm_head"] == (1,)


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
    # Beside it, the embedding's own name means it too; an embedding that cannot be quantized is not there to match.
    decided, faults = assign([rule("lm_head"), rule("*.v_proj", at=2)], paths[1:], 1, tied)
    assert len(faults) == 1
    assert faults[0].startswith("r.yaml:1 rules[0]: 'lm_head' matches no module")
    decided, faults = assign([rule("v_proj", "lm_head", "embed_tokens")], paths, 1, tied)
    assert faults == ()
    assert [match.path for match in decided if match.rule == 0] == [tied, "model.layers.0.self_attn.v_proj"]
    decided, faults = assign([rule("lm_head")], dense(1), 1, tied)
    assert [match.path for match in decided if match.rule == 0] == [tied, "lm_head"]
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
