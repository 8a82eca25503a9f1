from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlxq.errors import RecipeError
from mlxq.methods.formats import AFFINE, MODES, Format
from mlxq.recipe.load import budget_recipe, load_recipe, names_recipe, recipe_from_dict, shipped_recipes
from mlxq.recipe.schema import fault_message, json_schema, schema_faults
from mlxq.recipe.yaml import heading, parse_document

SHIPPED = ["4bit", "8bit", "lm-head-6", "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6", "moe"]
SHIPPED += ["mxfp4", "mxfp8", "nvfp4", "quickstart"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def faults_of(ref: str, *sets: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(ref, sets)
    assert caught.value.exit_code == 2
    return caught.value.faults


FULL = """\
# What it does
# and when.

# not this
model: org/name@main
output: ./out
dtype: bfloat16
default: {bits: 4, group_size: 128}
rules:
  - match: lm_head
    bits: 6
  - match: [v_proj, down_proj]
    layers: [":4", "-4:", 4:8, 3]
    group_size: 32
    optional: true
  - match: "*.mlp.gate"
    keep: true
  - match: "re:model\\\\.layers\\\\.(0|1)\\\\..*"
    mode: mxfp8
"""


def test_a_recipe_is_read_as_written(here: Path) -> None:
    Path("full.yaml").write_text(FULL)
    recipe = load_recipe("full.yaml")
    assert (recipe.name, recipe.path, recipe.text) == ("full", "full.yaml", FULL)
    assert (recipe.model, recipe.output, recipe.dtype) == ("org/name@main", "./out", "bfloat16")
    assert recipe.description == "What it does and when."
    assert recipe.default == Format(4, 128)
    assert recipe.strict is False
    head, projections, gate, mx = recipe.rules
    assert (head.patterns, head.layers, head.format, head.optional) == (
        ("lm_head",),
        None,
        Format(6, 128),
        False,
    )
    assert head.where == "full.yaml:10 rules[0]"
    assert projections.patterns == ("v_proj", "down_proj")
    assert projections.layers == (":4", "-4:", "4:8", "3")
    assert (projections.format, projections.optional) == (Format(4, 32), True)
    assert gate.format is None
    assert mx.patterns == (r"re:model\.layers\.(0|1)\..*",)
    assert mx.format == Format(8, 32, "mxfp8")
    assert load_recipe(Path("full.yaml")) == recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe.resolved())), "full") == recipe


def test_without_a_default_nothing_is_quantized(here: Path) -> None:
    Path("cast.yaml").write_text("dtype: float16\n")
    recipe = load_recipe("cast.yaml")
    assert (recipe.default, recipe.rules, recipe.dtype) == (None, (), "float16")
    assert recipe.resolved() == {"dtype": "float16", "rules": [], "method": "rtn", "strict": False, "gates": []}


@given(st.sampled_from([*MODES]))
def test_bits_and_group_size_default_to_the_modes_own(mode: str) -> None:
    recipe = recipe_from_dict({"default": {"mode": mode}}, "r")
    assert recipe.default == MODES[mode].default


def test_all_faults_come_at_once_with_lines(here: Path) -> None:
    Path("bad.yaml").write_text(
        """\
model: 3
dtype: bf16
defualt: {bits: 4}
default: {bits: 7, group_size: 48}
rules:
  - match: lm_head
    bitz: 6
  - match: ["re:(", ""]
    layers: ["a:", "::0"]
    keep: true
    bits: 4
  - bits: 6
  - match: x
    mode: mxpf4
  - 5
  - match: lm_head
  - match: y
    match: z
    bits: "5"
  - match: []
    keep: true
strict: "no"
extends: 4bits
"""
    )
    assert faults_of("bad.yaml") == (
        "bad.yaml:1: model: must be text, not 3",
        "bad.yaml:2: dtype: unknown dtype 'bf16'; known are bfloat16, float16, float32; did you mean 'bfloat16'?",
        "bad.yaml:3: defualt: unknown key; did you mean 'default'?",
        "bad.yaml:4: default.bits: mode affine has no 7-bit format; it has 2, 3, 4, 5, 6, 8",
        "bad.yaml:4: default.group_size: mode affine has no group size 48; it has 32, 64, 128",
        "bad.yaml:6: rules[0]: does nothing; give it bits, group_size or mode, or keep: true",
        "bad.yaml:7: rules[0].bitz: unknown key; did you mean 'bits'?",
        "bad.yaml:8: rules[1].match[0]: bad regular expression '(': missing ), unterminated subpattern at position 0",
        "bad.yaml:8: rules[1].match[1]: the pattern is empty",
        "bad.yaml:9: rules[1].layers[0]: bad layer slice 'a:': 'a' is not arithmetic over integers and n",
        "bad.yaml:9: rules[1].layers[1]: bad layer slice '::0': the step is zero",
        "bad.yaml:10: rules[1].keep: keep: true leaves nothing to quantize; delete it or bits",
        "bad.yaml:12: rules[2]: needs the key 'match'",
        "bad.yaml:14: rules[3].mode: unknown mode 'mxpf4'; MLX has affine, mxfp4, nvfp4, mxfp8; did you mean 'mxfp4'?",
        "bad.yaml:15: rules[4]: must be a mapping of keys to values, not 5",
        "bad.yaml:16: rules[5]: does nothing; give it bits, group_size or mode, or keep: true",
        "bad.yaml:18: rules[6].match: duplicate key; it is already on line 17",
        "bad.yaml:19: rules[6].bits: must be a whole number, not '5'",
        "bad.yaml:20: rules[7].match: is empty; delete the key or give it a value",
        "bad.yaml:22: strict: must be true or false, not 'no'",
        "bad.yaml:23: extends: no recipe is called '4bits'; did you mean '4bit'?",
    )


def test_a_rule_that_inherits_an_mx_mode_says_how_to_get_other_bits(here: Path) -> None:
    Path("r.yaml").write_text("default: {mode: mxfp4}\nrules:\n  - match: lm_head\n    bits: 6\n")
    assert faults_of("r.yaml") == (
        "r.yaml:4: rules[0].bits: mode mxfp4 has no 6-bit format; it has 4 "
        "(mode is the default's; say `mode: affine` for 6 bits)",
    )


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "r.yaml: is empty; a recipe is a mapping such as `default: {bits: 4}`"),
        ("# only this\n", "r.yaml: is empty; a recipe is a mapping such as `default: {bits: 4}`"),
        ("\n- a\n", "r.yaml:2: is a list; a recipe is a mapping of keys to values"),
        ("hello", "r.yaml:1: is a single value; a recipe is a mapping of keys to values"),
        ("default:\n\tbits: 4\n", "r.yaml:2: a tab indents this line; YAML indents with spaces"),
        ("model: a\n---\nmodel: b\n", "r.yaml:2: holds a second document; a recipe is one"),
        (BOMB, "r.yaml:1: its aliases expand to more than 100000 values"),
        ("a: &a [*a]", "r.yaml:1: an alias is inside itself or nests too deep"),
        ("[" * 100_000, "r.yaml:1: values are nested more than 20 deep"),
        ("a: &a 1\nb: [" + "*a, " * 101 + "]", "r.yaml:2: there are more than 100 aliases"),
        ("model: 2020-13-45\n", "r.yaml:1: model: 2020-13-45 is a date to YAML; quote it to make it text"),
        ("[1]: 2\n", "r.yaml:1: a list can't be a key"),
        (
            "model: a\ndefault: {<<: 3, bits: 4}\n",
            "r.yaml:2: default: `<<` is not part of recipes; use `extends`",
        ),
        ("a: &a\n  b: [*a]\n", "r.yaml:2: an alias is inside itself or nests too deep"),
        ("a: *b\n", "r.yaml:1: no value is marked &b, as this alias asks for"),
        ("a: " + "[" * 300 + "]" * 300, "r.yaml:1: values are nested more than 20 deep"),
        ("a: " + "{b: " * 100_000, "r.yaml:1: values are nested more than 20 deep"),
        ("- " * 100_000, "r.yaml:1: values are nested more than 20 deep"),
        ("[" + "a," * 250_000 + "]", "r.yaml: holds more than 250000 values; that is no recipe"),
        ("\ndefault: {bits: !!int ''}\n", "r.yaml:2: has the tag !!int; write the value without it"),
        ("model: !!binary x\n", "r.yaml:1: has the tag !!binary; write the value without it"),
        ("model: !!timestamp x\n", "r.yaml:1: has the tag !!timestamp; write the value without it"),
        ("!!set {a}\n", "r.yaml:1: has the tag !!set; write the value without it"),
        ("!own a: 1\n", "r.yaml:1: has the tag !own; write the value without it"),
        ("model: ! a\n", "r.yaml:1: has the tag !; write the value without it"),
        ("default: {bits: " + "4" * 5000 + "}", "r.yaml:1: has a number of 5,000 characters; no recipe needs one"),
        ("default: {bits: 0x" + "f" * 5000 + "}", "r.yaml:1: has a number of 5,002 characters; no recipe needs one"),
        ("budget: {bpw: " + "4" * 5000 + ".5}", "r.yaml:1: has a number of 5,002 characters; no recipe needs one"),
        ("default: {bits: 0x_}", "r.yaml:1: has 0x_ where a number was begun"),
        ("model: a\0\n", "r.yaml:1: holds the control character U+0000"),
        ("\nmodel: \x1b[31m\n", "r.yaml:2: holds the control character U+001B"),
        ('model: "\\0"\n', "r.yaml:1: model: holds the control character U+0000"),
        ('model: "\\x9b"\n', "r.yaml:1: model: holds the control character U+009B"),
        ('"\\e": a\n', "r.yaml:1: a key holds the control character U+001B"),
        ("budget: {bpw: .inf}\n", "r.yaml:1: budget.bpw: must be a finite number, not inf"),
        ("budget: {bpw: -.inf}\n", "r.yaml:1: budget.bpw: must be a finite number, not -inf"),
        ("budget: {bpw: .nan}\n", "r.yaml:1: budget.bpw: must be a finite number, not nan"),
        ("budget: {bpw: 0}\n", "r.yaml:1: budget.bpw: must be more than 0, not 0"),
        ("budget: {bpw: 33}\n", "r.yaml:1: budget.bpw: must be at most 32, not 33"),
        ("budget: {bpw: true}\n", "r.yaml:1: budget.bpw: must be a number, not true"),
        ("budget: {size: 0GB}\n", "r.yaml:1: budget.size: no weights fit in 0 bytes"),
        (
            "budget: {size: '" + "9" * 400 + "GB'}\n",
            f"r.yaml:1: budget.size: cannot read the size '{'9' * 36}...; write it as 2.2GB, 900MB or 2GiB",
        ),
        (
            "method: fit\ncalibration: {tokens: 5}\n",
            "r.yaml:2: calibration.tokens: must be at least 1,024, not 5",
        ),
        (
            "method: fit\ncalibration: {tokens: 2000000000}\n",
            "r.yaml:2: calibration.tokens: must be at most 1,000,000,000, not 2000000000",
        ),
        ("budget: {bpw: 4}\noptions: [4]\n", "r.yaml:2: options: needs at least 2, not 1"),
        ("budget: {bpw: 4}\noptions: []\n", "r.yaml:2: options: is empty; delete the key or give it a value"),
        ("gates: [" + "kl_mean<1, " * 101 + "]\n", "r.yaml:1: gates: may hold 100, not 101"),
        (
            "rules: [{match: a, bits: 4, layers: [':1e9']}]\n",
            "r.yaml:1: rules[0].layers[0]: bad layer slice ':1e9': '1e9' is not arithmetic over integers and n",
        ),
        ("default:\n", "r.yaml:1: default: has no value; delete the key or give it one"),
        ("model: ''\n", "r.yaml:1: model: is empty; delete the key or give it a value"),
    ],
)
def test_files_that_are_no_recipe(here: Path, text: str, fault: str) -> None:
    Path("r.yaml").write_text(text)
    assert faults_of("r.yaml") == (fault,)


def test_code_in_a_tag_is_refused(here: Path) -> None:
    Path("r.yaml").write_text("model: !!python/object/apply:os.getcwd []\noutput: !!python/name:os.sep x\n")
    assert faults_of("r.yaml") == ("r.yaml:1: has the tag !!python/object/apply:os.getcwd; write the value without it",)


def test_aliases_stand_for_what_they_mark(here: Path) -> None:
    Path("r.yaml").write_text("rules:\n  - {match: &heads [lm_head], bits: 6}\n  - {match: *heads, bits: 8}\n")
    assert [rule.patterns for rule in load_recipe("r.yaml").rules] == [("lm_head",), ("lm_head",)]


@pytest.mark.parametrize("value", ["4:8", "=", "2001-12-14 21:59:43", "1e3", "~/x", "0o7"])
def test_what_is_no_number_in_a_recipe_is_text(here: Path, value: str) -> None:
    Path("r.yaml").write_text(f"model: {value}\n")
    assert load_recipe("r.yaml").model == value


def test_the_first_faults_are_shown_and_how_many_more(here: Path) -> None:
    Path("r.yaml").write_text("".join(f"k{number}: 1\n" for number in range(30_000)))
    faults = faults_of("r.yaml")
    known = "extends, model, output, dtype, default, rules, budget, options, method, calibration, strict, gates, upload"
    assert faults[:2] == tuple(f"r.yaml:{n + 1}: k{n}: unknown key; known are {known}" for n in range(2))
    assert (len(faults), faults[-1]) == (21, "and 29,980 more faults")
    Path("r.yaml").write_text("rules:\n" + "- 5\n" * 30_000)
    assert faults_of("r.yaml")[-1] == "and 29,980 more faults"
    # One more is no shorter than the fault itself.
    Path("r.yaml").write_text("".join(f"k{number}: 1\n" for number in range(21)))
    assert faults_of("r.yaml")[-1] == f"r.yaml:21: k20: unknown key; known are {known}"


def test_what_is_long_in_a_file_is_short_in_a_message(here: Path) -> None:
    for line in (
        "model: 1\n? {}\n: 1",
        "gates: ['{}']",
        "dtype: {}",
        "default: {{mode: {}}}",
        "extends: {}",
        "method: {}",
    ):
        Path("r.yaml").write_text(line.format("x" * 100_000))
        assert all(len(fault) <= 1000 for fault in faults_of("r.yaml"))


def test_only_regular_files_are_read(here: Path) -> None:
    os.mkfifo("pipe.yaml")
    assert faults_of("pipe.yaml") == ("pipe.yaml: is a device or a pipe; a recipe is a YAML file",)
    assert faults_of("/dev/zero") == ("/dev/zero: is a device or a pipe; a recipe is a YAML file",)
    Path("child.yaml").write_text("extends: /dev/zero\n")
    assert faults_of("child.yaml") == ("/dev/zero: is a device or a pipe; a recipe is a YAML file",)
    with Path("sparse.yaml").open("wb") as file:
        file.truncate(10**9)
    assert faults_of("sparse.yaml") == ("sparse.yaml: is larger than 1 MB; that is no recipe",)


def test_a_chain_of_extends_ends(here: Path) -> None:
    Path("r0.yaml").write_text("extends: 4bit\n")
    for number in range(1, 1500):
        Path(f"r{number}.yaml").write_text(f"extends: r{number - 1}.yaml\n")
    assert load_recipe("r18.yaml").default == Format(4, 64)
    assert faults_of("r19.yaml") == ("r0.yaml:1: extends: more than 20 recipes extend each other",)
    assert faults_of("r1499.yaml") == ("r1480.yaml:1: extends: more than 20 recipes extend each other",)


@pytest.mark.parametrize(
    ("budget", "fault"),
    [
        ({"bpw": math.inf}, "--bpw inf: must be a finite number, not inf"),
        ({"bpw": math.nan}, "--bpw nan: must be a finite number, not nan"),
        ({"bpw": -1.0}, "--bpw -1: must be more than 0, not -1.0"),
        ({"bpw": 0.0}, "--bpw 0: must be more than 0, not 0.0"),
        ({"size": "lots"}, "--size lots: cannot read the size 'lots'; write it as 2.2GB, 900MB or 2GiB"),
        ({"size": "0MB"}, "--size 0MB: no weights fit in 0 bytes"),
    ],
)
def test_a_fault_in_a_budget_names_its_option(here: Path, budget: dict[str, object], fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        budget_recipe(budget)
    assert caught.value.faults == (fault,)
    Path("r.yaml").write_text("strict: true\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", (), budget)
    assert caught.value.faults == (fault,)


def test_pydantic_never_speaks() -> None:
    assert fault_message("some_kind_of_tomorrow", [1], {}) == "can't be a list; docs/recipes.md says what goes here"
    data = {
        "default": {"bits": 4.5},
        "rules": {"a": 1},
        "budget": [],
        "strict": "x",
        "options": 5,
        "upload": {"repo": 1},
    }
    messages = [fault.message for fault in schema_faults({**data, "calibration": {"tokens": "x", "text": 5}})]
    assert len(messages) == 8
    assert all(message.startswith("must be ") for message in messages)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("a\0b", "model: holds the control character U+0000"),
        ("\ud800", "model: holds the control character U+D800"),
        (16**5000, "model: has more digits than a recipe needs"),
    ],
    ids=["nul", "surrogate", "digits"],
)
def test_a_recorded_value_is_held_to_the_same(value: object, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict({"model": value}, "mlxq.json")
    assert caught.value.faults[0] == f"mlxq.json: {fault}"


def test_a_recorded_recipe_nests_and_holds_no_more_than_a_written_one() -> None:
    deep: object = 1
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RecipeError, match=r"mlxq.json: values are nested more than 20 deep"):
        recipe_from_dict({"gates": deep}, "mlxq.json")
    with pytest.raises(RecipeError, match=r"mlxq.json: holds more than 250000 values"):
        recipe_from_dict({"gates": ["x"] * 250_001}, "mlxq.json")


def test_files_that_are_not_text(here: Path) -> None:
    Path("latin.yaml").write_bytes(b"model: caf\xe9\n")
    assert faults_of("latin.yaml") == ("latin.yaml: is not UTF-8 text (byte 10 is 0xe9)",)
    Path("huge.yaml").write_bytes(b"#" * 1_000_001)
    assert faults_of("huge.yaml") == ("huge.yaml: is larger than 1 MB; that is no recipe",)
    Path("folder.yaml").mkdir()
    assert faults_of("folder.yaml") == ("folder.yaml: is a folder; a recipe is a YAML file",)
    assert faults_of("none.yaml") == ("no such recipe file: none.yaml",)


@given(st.text(max_size=60))
def test_no_text_crashes_the_parser(text: str) -> None:
    document = parse_document(text)
    assert document.faults or isinstance(document.data, dict)


def test_a_child_overrides_keys_and_comes_first_in_rules(here: Path) -> None:
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text(
        "extends: 8bit\nmodel: base\nstrict: true\nrules:\n  - match: lm_head\n    bits: 8\n"
    )
    Path("child.yaml").write_text("extends: sub/base.yaml\nmodel: mine\nrules:\n  - match: lm_head\n    bits: 6\n")
    recipe = load_recipe("child.yaml")
    assert (recipe.model, recipe.strict, recipe.default) == ("mine", True, Format(8, 64))
    assert [(r.where, r.inherited) for r in recipe.rules] == [
        ("child.yaml:4 rules[0]", False),
        ("sub/base.yaml:5 rules[0]", True),
    ]
    assert "extends" not in recipe.resolved()


def test_a_fault_in_an_extended_file_names_that_file(here: Path) -> None:
    Path("base.yaml").write_text("rules:\n  - match: x\n    bits: 7\n")
    Path("child.yaml").write_text("extends: base.yaml\nrules:\n  - match: y\n    bits: 1\n")
    assert faults_of("child.yaml") == (
        "child.yaml:4: rules[0].bits: mode affine has no 1-bit format; it has 2, 3, 4, 5, 6, 8",
        "base.yaml:3: rules[0].bits: mode affine has no 7-bit format; it has 2, 3, 4, 5, 6, 8",
    )


def test_recipes_that_extend_in_a_circle(here: Path) -> None:
    Path("a.yaml").write_text("model: m\nextends: b.yaml\n")
    Path("b.yaml").write_text("extends: a.yaml\n")
    assert faults_of("a.yaml") == (
        "b.yaml:1: extends: recipes extend each other in a circle: a.yaml -> b.yaml -> a.yaml",
    )


def test_set_overrides_what_the_file_says(here: Path) -> None:
    Path("full.yaml").write_text(FULL)
    sets = ["default.bits=3", "rules.0.bits=5", "rules[1].layers=4:8", "strict=true", "model=./x"]
    recipe = load_recipe("full.yaml", sets)
    assert recipe.default == Format(3, 128)
    assert recipe.rules[0].format == Format(5, 128)
    assert recipe.rules[1].layers == ("4:8",)
    assert (recipe.strict, recipe.model) == (True, "./x")
    assert recipe_from_dict(recipe.resolved(), "full") == recipe
    assert load_recipe("mxfp4", ["default={bits: 8}"]).default == Format(8, 64)


def test_set_reaches_what_is_inherited(here: Path) -> None:
    Path("child.yaml").write_text("extends: lm-head-6\n")
    recipe = load_recipe("child.yaml", ["default.bits=3", "rules.0.bits=8"])
    assert (recipe.default, recipe.rules[0].format) == (Format(3, 64), Format(8, 64))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("default.bitz=3", "default.bitz: unknown key; did you mean 'bits'?"),
        ("defalt.bits=3", "defalt: unknown key; did you mean 'default'?"),
        ("default.bits=x", "default.bits: must be a whole number, not 'x'"),
        ("default.bits=", "default.bits: has no value; delete the key or give it one"),
        ("rules.9.bits=4", "rules has no item '9'; there are 1 (0 to 0)"),
        ("rules.x.bits=4", "rules has no item 'x'; there are 1 (0 to 0)"),
        ("rules.0.bits.x=4", "rules[0].bits is 6; it has no 'x'"),
        ("default", "write it as PATH=VALUE, such as default.bits=3 or rules.0.keep=true"),
        ("=3", "write it as PATH=VALUE, such as default.bits=3 or rules.0.keep=true"),
        ("extends=4bit", "extends can't be set; name the other recipe instead of this one"),
        ("model=[", "the value is not valid YAML: did not find expected node content"),
        ("default.bits=!!int ''", "the value has the tag !!int; write the value without it"),
        ("model=a\x01", "the value holds the control character U+0001"),
        (".".join("a" * 21) + "=1", "values are nested more than 20 deep"),
        ("rules.99999999999.bits=4", "rules has no item '99999999999'; there are 1 (0 to 0)"),
    ],
)
def test_a_fault_in_set_names_it(text: str, fault: str) -> None:
    assert faults_of("lm-head-6", text) == (f"--set {text}: {fault}",)


def test_a_recorded_recipe_is_checked_too() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict({"default": {"bits": 7}, "rules": [{"match": "a", "keep": True, "x": 1}]}, "mlxq.json")
    assert caught.value.faults == (
        "mlxq.json: rules[0].x: unknown key; known are match, layers, bits, group_size, mode, keep, optional",
        "mlxq.json: default.bits: mode affine has no 7-bit format; it has 2, 3, 4, 5, 6, 8",
    )


def test_shipped_recipes_are_complete_and_say_what_they_are_for() -> None:
    recipes = shipped_recipes()
    assert sorted(recipe.name for recipe in recipes) == sorted(SHIPPED)
    for recipe in recipes:
        assert recipe.default is not None
        assert len(recipe.description) > 40
        assert all(rule.optional for rule in recipe.rules), recipe.name
        assert recipe_from_dict(recipe.resolved(), recipe.name) == recipe
    assert next(recipe for recipe in recipes if recipe.name == "quickstart").model == "sample"


def test_a_shipped_name_is_taken_before_a_folder_of_that_name(here: Path) -> None:
    Path("4bit").mkdir()
    assert load_recipe("4bit").default == Format(4, 64)
    assert faults_of("4bti") == ("no recipe is called '4bti'; did you mean '4bit'?",)


def test_the_heading_leaves_out_editor_directives() -> None:
    assert heading("# yaml-language-server: $schema=x.json\n#\n# One.\n# Two.\n#\n# Three.\n") == "One. Two."
    assert heading("model: a # no\n") == ""


def test_the_json_schema_describes_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    rule = schema["properties"]["rules"]["items"]
    definitions = schema["$defs"]
    models = [schema, definitions[rule["$ref"].rpartition("/")[2]]]
    for model in models:
        assert model["additionalProperties"] is False
        assert all("description" in prop for prop in model["properties"].values())
        assert not any("default" in prop for prop in model["properties"].values())
    assert set(models[0]["properties"]) == {
        "extends",
        "model",
        "output",
        "dtype",
        "default",
        "rules",
        "budget",
        "options",
        "method",
        "calibration",
        "strict",
        "gates",
        "upload",
    }
    assert models[1]["required"] == ["match"]
    affine = sorted(AFFINE.bits)
    assert schema["properties"]["options"]["items"]["anyOf"][0] == {"enum": affine}
    assert models[1]["properties"]["bits"]["enum"] == sorted({bits for mode in MODES.values() for bits in mode.bits})
    for text in [FULL, *(recipe.text for recipe in shipped_recipes())]:
        data = yaml.safe_load(text)
        assert set(data) <= set(models[0]["properties"])
        for each in data.get("rules", []):
            assert set(each) <= set(models[1]["properties"])


@pytest.mark.parametrize(
    ("ref", "fault"),
    [
        ("", "the recipe's name is empty"),
        ("a/" + "x" * 5000, f"no such recipe file: a/{'x' * 5000}"),
        ("a/b\0.yaml", "no such recipe file: a/b\0.yaml"),
    ],
)
def test_names_no_file_can_have(here: Path, ref: str, fault: str) -> None:
    assert faults_of(ref) == (fault,)


def test_what_names_a_recipe(here: Path) -> None:
    for text in ("x.yaml", "a/b.yml", "4bit"):
        assert names_recipe(text)
    Path("8bit").mkdir()
    for text in ("8bit", "x" * 300, "a\0b", "../recipes/4bit", "", "model"):
        assert not names_recipe(text)
