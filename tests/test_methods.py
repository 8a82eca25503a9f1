"""The registry: what a recipe's method comes to, what each method is given, and that every list is this one."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlxq.methods import method as method_module
from mlxq.methods import registry
from mlxq.methods.affine_fit import affine_fit
from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.gptq import GPTQ, Feedback, feedback, gptq
from mlxq.methods.method import Guide, Method, Needs, given_by_text
from mlxq.methods.mx_fit import MX_FIT, mx_fit
from mlxq.methods.registry import METHOD_NAMES, METHODS, choose, described, named, needs_text, scored_by, uses_text
from mlxq.methods.rtn import RTN
from mlxq.planning.plan import Step
from mlxq.recipe.schema import RecipeModel
from mlxq.tensors import TensorSpec
from mlxq.writing.execute import blocks_of

DOCS = Path(__file__).parents[1] / "docs"
TEXT = Needs.SECOND_MOMENTS | Needs.HESSIANS
FOUR, EIGHT, MXFP4 = Format(4, 64), Format(8, 64), Format(4, 32, "mxfp4")


@pytest.mark.parametrize(
    ("asked", "fmt", "given", "expected"),
    [
        ("rtn", FOUR, TEXT, "rtn"),
        ("rtn", MXFP4, TEXT, "rtn"),
        ("fit", FOUR, TEXT, "fit"),
        ("fit", FOUR, Needs.NOTHING, "fit"),
        ("fit", MXFP4, Needs.NOTHING, "fit"),
        ("gptq", FOUR, TEXT, "gptq"),
        ("gptq", EIGHT, TEXT, "gptq"),
        ("gptq", MXFP4, TEXT, "fit"),
        ("gptq", FOUR, Needs.NOTHING, "fit"),
        ("gptq", FOUR, Needs.SECOND_MOMENTS, "fit"),
        ("auto", FOUR, TEXT, "gptq"),
        ("auto", Format(6, 64), TEXT, "gptq"),
        ("auto", EIGHT, TEXT, "fit"),
        ("auto", MXFP4, TEXT, "fit"),
        ("auto", FOUR, Needs.NOTHING, "fit"),
    ],
)
def test_what_a_recipe_asks_for_comes_to_what_can_be_done(asked: str, fmt: Format, given: Needs, expected: str) -> None:
    chosen = choose(asked, fmt, given)
    assert chosen.name == expected
    assert chosen.takes(fmt)
    assert named(expected, fmt) is chosen, "what a plan records finds the same encoder again"


@pytest.mark.parametrize(("asked", "expected"), [("rtn", "rtn"), ("fit", "fit"), ("gptq", "fit"), ("auto", "fit")])
def test_scores_stand_on_a_method_without_hessians(asked: str, expected: str) -> None:
    assert {scored_by(asked, fmt).name for fmt in (FOUR, EIGHT, MXFP4)} == {expected}


def test_text_is_used_and_needed_where_methods_say_so() -> None:
    assert {name: (uses_text(name), needs_text(name)) for name in METHOD_NAMES} == {
        "rtn": (False, False),
        "fit": (True, False),
        "gptq": (True, True),
        "auto": (True, False),
    }


def test_hessians_that_would_not_fit_are_not_promised() -> None:
    assert Needs.HESSIANS in given_by_text((4096, 14336))
    assert Needs.HESSIANS in given_by_text((127, 1024, 2048))
    assert given_by_text((128, 1024, 2048)) == Needs.SECOND_MOMENTS
    assert method_module.HESSIAN_BYTES == 128 * 2048**2 * 4


def test_schema_and_docs_name_every_method_and_no_other() -> None:
    enum = RecipeModel.model_json_schema()["properties"]["method"]["enum"]
    assert tuple(enum) == METHOD_NAMES == ("rtn", "fit", "gptq", "auto")
    assert described() == "rtn rounds, fit refits each grid, gptq adds error feedback, auto picks"
    text = (DOCS / "methods.md").read_text("utf-8")
    headings = re.findall(r"^## `(\w+)`", text, re.MULTILINE)
    assert set(headings) <= set(METHOD_NAMES)
    assert all(f"`{method.name}`" in text for method in METHODS)
    assert {method.name for method in METHODS if method.uses} == set(headings), "each of them has its section"
    assert "groups of 32, 64 or 128" in text
    assert "2, 3, 4, 5, 6 or 8 bits" in text


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("fmt", [FOUR, Format(3, 32), MXFP4, Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")], ids=str)
def test_an_expert_and_a_share_of_rows_are_encoded_as_in_the_whole(method: Method, fmt: Format) -> None:
    if not method.takes(fmt):
        return
    weight = (0.05 * mx.random.normal((2, 24, 128), key=mx.random.key(3))).astype(mx.bfloat16)
    inputs = mx.random.normal((2, 512, 128), key=mx.random.key(4)) * mx.linspace(0.5, 2, 128)
    hessian = inputs.swapaxes(1, 2) @ inputs / 512
    guide = method.guide(mx.diagonal(hessian, axis1=1, axis2=2), hessian, fmt, tied=False)
    whole = method.encode(weight, fmt, guide).arrays()
    assert method.rows_independent
    for expert in range(2):
        share = method.encode(weight[expert, 8:20], fmt, guide.of_expert(expert)).arrays()
        assert all(mx.array_equal(array, whole[name][expert, 8:20]) for name, array in share.items()), expert


def test_methods_make_of_a_guide_what_their_functions_make_of_the_numbers() -> None:
    weight = (0.05 * mx.random.normal((16, 128), key=mx.random.key(5))).astype(mx.bfloat16)
    moments = mx.exp(2 * mx.random.normal((128,), key=mx.random.key(6)))
    hessian = mx.diag(moments) + 0.3

    def same(ours: Encoded, theirs: Encoded) -> bool:
        return all(mx.array_equal(array, theirs.arrays()[name]) for name, array in ours.arrays().items())

    assert same(named("fit", FOUR).encode(weight, FOUR, Guide(moments)), affine_fit(weight, FOUR, moments))
    assert same(MX_FIT.encode(weight, MXFP4, Guide(moments)), mx_fit(weight, MXFP4, moments))
    guide = GPTQ.guide(moments, hessian, FOUR, tied=False)
    assert isinstance(guide, Feedback)
    assert same(GPTQ.encode(weight, FOUR, guide), gptq(weight, FOUR, feedback(hessian, 64)))
    # A module that the text never reached is fitted.
    assert same(GPTQ.encode(weight, FOUR, Guide()), affine_fit(weight, FOUR))
    assert len(guide.arrays()) == 2
    assert len(Guide(moments).arrays()) == 1


def step_of(method: str, shape: tuple[int, ...], fmt: Format) -> Step:
    spec = TensorSpec("m.weight", "BF16", shape)
    return Step("m.weight", spec, None, fmt, False, False, fmt.layout(spec), method, guided=True)


def test_blocks_are_as_tall_as_a_method_needs_them() -> None:
    wide = 8 << 20
    assert {b.stop - b.start for b in blocks_of(step_of("rtn", (512, wide), FOUR))} == {1}
    tall = blocks_of(step_of("gptq", (4 * 8192, 8192), FOUR))
    assert {b.stop - b.start for b in tall} == {8192 // 2}
    assert RTN.least_rows(8192) == 1


def test_a_method_whose_rows_depend_on_each_other_is_given_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Whole(Method):
        name, does, rows_independent = "whole", "takes a weight whole", False

        def encode(self, weight: mx.array, fmt: Format, guide: Guide) -> Encoded:
            return RTN.encode(weight, fmt, guide)

    monkeypatch.setattr(registry, "METHODS", (*METHODS, Whole()))
    assert len(blocks_of(step_of("rtn", (1 << 16, 1024), FOUR))) > 1
    assert [(b.start, b.stop) for b in blocks_of(step_of("whole", (1 << 16, 1024), FOUR))] == [(0, 1 << 16)]
    experts = blocks_of(step_of("whole", (3, 1 << 15, 1024), FOUR))
    assert [(b.start, b.stop) for b in experts] == [(i << 15, (i + 1) << 15) for i in range(3)]
