"""The microscaling fit must never lose to ``mx.quantize`` by its own measure."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxq.methods.affine_fit import group_weights
from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.mx_fit import _rounded, mx_fit
from mlxq.methods.rtn import round_to_nearest
from mlxq.methods.small_floats import E4M3, E8M0, nearest_e2m1, nearest_e4m3
from tests.arrays import number

FORMATS = [Format(4, 32, "mxfp4"), Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_group_is_worse(fmt: Format) -> None:
    weight = (0.02 * mx.random.normal((2, 32, 128), key=mx.random.key(0))).astype(mx.bfloat16)
    importance = mx.exp(mx.random.normal((2, 128), key=mx.random.key(1)))
    weights = group_weights(importance, fmt)[:, None]

    def losses(decoded: mx.array) -> mx.array:
        error = (decoded - weight.astype(mx.float32)).reshape(2, 32, -1, fmt.group_size)
        return (weights * error * error).sum(axis=-1)

    fitted = losses(fmt.decode(mx_fit(weight, fmt, importance).arrays()))
    rounded = losses(fmt.decode(round_to_nearest(weight, fmt).arrays()))
    assert bool((fitted <= rounded).all())
    if fmt.bits == 4:
        assert number(fitted.sum()) < 0.97 * number(rounded.sum())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_stay_zero(fmt: Format) -> None:
    weight = mx.zeros((2, 64), dtype=mx.bfloat16)
    assert mx.array_equal(fmt.decode(mx_fit(weight, fmt).arrays()), mx.zeros((2, 64)))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_scale_found_is_the_best_within_reach(fmt: Format) -> None:
    """Of the scales within a factor of two, or 1.4 where codes are finer, none would lose less."""
    weight = mx.random.normal((16, 128), key=mx.random.key(4)).astype(mx.bfloat16)
    groups = weight.astype(mx.float32).reshape(16, -1, fmt.group_size)
    codes = fmt.kind.scale_codes
    assert codes is not None

    def losses(encoded: Encoded) -> mx.array:
        return ((fmt.decode(encoded.arrays()).reshape(groups.shape) - groups) ** 2).sum(axis=-1)

    found = mx_fit(weight, fmt)
    least = losses(found)
    reach = range(-1, 2) if codes is E8M0 else range(-4, 4)
    for step in reach:
        scales = (round_to_nearest(weight, fmt).scales.astype(mx.int32) + step).astype(mx.uint8)
        assert bool((least <= losses(_rounded(groups, scales, codes.values(scales), fmt)) * (1 + 1e-5)).all())
    moved = found.scales != round_to_nearest(weight, fmt).scales
    assert bool(moved.any()) == (fmt.bits == 4), "eight bits have room to spare for the largest weight"


def test_small_floats_round_to_the_nearest_value() -> None:
    values = mx.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    numbers = mx.linspace(-7, 7, 1001)
    codes = nearest_e2m1(numbers)
    decoded = values[codes & 7] * mx.where(codes >= 8, -1, 1)
    nearest = mx.abs(mx.abs(numbers)[:, None] - values).min(axis=1)
    assert mx.allclose(mx.abs(numbers - decoded), nearest, atol=1e-6)
    assert mx.array_equal(mx.from_fp8(nearest_e4m3(mx.array([1e6, -1e6])), dtype=mx.float32), mx.array([448.0, -448.0]))
    assert [E8M0.values(mx.array([code], mx.uint8)).item() for code in (126, 127, 130)] == [0.5, 1.0, 8.0]
    for scales in (E8M0, E4M3):
        ends = scales.values(mx.array([scales.largest, scales.largest + 1], mx.uint8))
        assert mx.isfinite(ends[0]).item()
    assert mx.isnan(E4M3.values(mx.array([127], mx.uint8))).item()
