"""What each mode says of itself must be what MLX stores; nobody else knows the list."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxq.errors import BadInputError
from mlxq.methods.formats import AFFINE, HELPER_PARTS, MODES, PARTS, Format, fault_of
from mlxq.methods.rtn import round_to_nearest
from mlxq.tensors import TensorSpec

PACKAGE = Path(__file__).parents[1] / "mlxq"
EVERY = [Format(bits, size, mode.name) for mode in MODES.values() for bits in mode.bits for size in mode.group_sizes]
CODES = {mx.uint32: "U32", mx.uint8: "U8", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}


@pytest.mark.parametrize("fmt", EVERY, ids=lambda fmt: f"{fmt.mode}-{fmt.bits}-{fmt.group_size}")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_layout_and_size_are_those_of_what_mlx_makes(fmt: Format, dtype: mx.Dtype) -> None:
    weight = mx.random.normal((3, 5, 256), key=mx.random.key(0)).astype(dtype)
    made = round_to_nearest(weight, fmt).arrays()
    planned = fmt.layout(TensorSpec("m.weight", CODES[dtype], weight.shape))
    found = tuple(TensorSpec(f"m.{name}", CODES[array.dtype], array.shape) for name, array in made.items())
    assert planned == found
    assert set(made) <= set(fmt.kind.parts) <= set(PARTS)
    assert fmt.logical_columns(made["weight"].shape[-1]) == 256
    if dtype != mx.float32:
        assert fmt.bits_per_weight == sum(array.nbytes for array in made.values()) * 8 / weight.size


@pytest.mark.parametrize("fmt", EVERY, ids=lambda fmt: f"{fmt.mode}-{fmt.bits}-{fmt.group_size}")
def test_a_module_says_what_it_is_stored_in(fmt: Format) -> None:
    plain = nn.Linear(256, 8, bias=False)
    assert Format.of_module(plain) is None
    stored = nn.QuantizedLinear.from_linear(plain, **fmt.as_config())
    assert Format.of_module(stored) == fmt
    parts = fmt.stored_parts(stored)
    assert mx.array_equal(fmt.decode(parts), fmt.decode(round_to_nearest(plain.weight, fmt).arrays()))
    some = fmt.decode(fmt.rows(parts, mx.array([5, 1])))
    assert mx.array_equal(some, fmt.decode(parts)[mx.array([5, 1])])


def test_decoding_rounds_nothing_to_the_scales_dtype() -> None:
    fmt = Format(4, 64)
    parts = round_to_nearest(mx.random.normal((4, 64), key=mx.random.key(1)).astype(mx.bfloat16), fmt).arrays()
    exact, as_mlx = fmt.decode(parts), fmt.dequantize(parts, mx.bfloat16)
    assert exact.dtype == mx.float32
    assert as_mlx.dtype == mx.bfloat16
    assert not mx.array_equal(exact, as_mlx.astype(mx.float32))
    assert mx.allclose(exact, as_mlx.astype(mx.float32), rtol=1e-2, atol=1e-2)


def test_each_expert_of_a_stack_has_its_own_tensor_scale() -> None:
    fmt = MODES["nvfp4"].default
    weight = mx.random.normal((3, 4, 64), key=mx.random.key(2))
    scales = mx.array([0.5, 1.0, 4.0])
    parts = {**round_to_nearest(weight, fmt).arrays(), "global_scale": scales[:, None, None]}
    together = fmt.decode(parts)
    for expert in range(3):
        alone = {name: array[expert] for name, array in parts.items() if name != "global_scale"}
        one = mx.dequantize(
            alone["weight"],
            alone["scales"],
            group_size=fmt.group_size,
            bits=fmt.bits,
            mode=fmt.mode,
            global_scale=scales[expert],
            dtype=mx.float32,
        )
        assert mx.array_equal(together[expert], one)
    assert not mx.array_equal(together[0], fmt.decode({k: v for k, v in parts.items() if k != "global_scale"})[0])


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"bits": 3, "group_size": 32}, Format(3, 32)),
        ({"bits": None, "group_size": None}, Format(4, 64)),
        ({"mode": "mxfp8"}, Format(8, 32, "mxfp8")),
        ({"mode": None, "bits": 8}, Format(8, 64)),
        ({"mode": "nvfp4", "bits": 4, "group_size": 16}, Format(4, 16, "nvfp4")),
    ],
)
def test_an_entry_of_config_json_may_leave_things_out(entry: dict[str, Any], expected: Format) -> None:
    assert Format.from_config(entry) == expected
    assert Format.from_config(expected.as_config()) == expected


def test_a_mode_of_the_future_is_said() -> None:
    with pytest.raises(BadInputError, match="'int9'"):
        Format.from_config({"mode": "int9"})


def test_a_width_takes_the_largest_group_that_divides_it() -> None:
    assert Format(4, 128).fitted_to(256) == Format(4, 128)
    assert Format(4, 128).fitted_to(192) == Format(4, 64)
    assert Format(4, 64).fitted_to(96) == Format(4, 32)
    assert Format(4, 32).fitted_to(128) == Format(4, 32), "never a larger one than was asked"
    assert Format(4, 64).fitted_to(80) is None
    assert Format(4, 16, "nvfp4").fitted_to(80) == Format(4, 16, "nvfp4")
    with pytest.raises(ValueError, match="80 columns"):
        Format(4, 64).layout(TensorSpec("m.weight", "BF16", (2, 80)))


def test_names_and_faults() -> None:
    assert [str(fmt) for fmt in (Format(3, 32), MODES["mxfp4"].default)] == ["3:32", "mxfp4"]
    assert Format(3, 32).in_words() == "3 bits, groups of 32"
    assert MODES["mxfp8"].default.in_words() == "mxfp8, 8 bits, groups of 32"
    assert fault_of("affine", 7, 64) == "mode affine has no 7-bit format; it has 2, 3, 4, 5, 6, 8"
    assert fault_of("mxfp4", 4, 64) == "mode mxfp4 has no group size 64; it has 32"
    assert "unknown mode" in str(fault_of("int9", 4, 64))
    assert all(fault_of(fmt.mode, fmt.bits, fmt.group_size) is None for fmt in EVERY)


def test_nobody_else_knows_modes_or_parts() -> None:
    """No module outside ``methods`` compares a mode by name or lists what a quantized module stores."""
    names = {AFFINE.name, *HELPER_PARTS} - {"scales"}
    for module in PACKAGE.rglob("*.py"):
        if module.parent.name == "methods":
            continue
        nodes = ast.walk(ast.parse(module.read_text("utf-8")))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not names & texts, module
