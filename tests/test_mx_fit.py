"""The microscaling fit must never lose to ``mx.quantize`` by its own measure."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxq.methods.affine_fit import group_weights
from mlxq.methods.formats import Format
from mlxq.methods.mx_fit import mx_fit
from mlxq.methods.rtn import round_to_nearest

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
        assert fitted.sum().item() < 0.97 * rounded.sum().item()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_zeros_stay_zero(fmt: Format) -> None:
    weight = mx.zeros((2, 64), dtype=mx.bfloat16)
    assert mx.array_equal(fmt.decode(mx_fit(weight, fmt).arrays()), mx.zeros((2, 64)))
