"""``fit`` must never lose to min/max rounding by its own measure, and must find a grid that is there."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxq.methods import affine_fit as affine_fit_module
from mlxq.methods.affine_fit import Grid, affine_fit, group_weights, nearest_codes
from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.rtn import round_to_nearest
from tests.arrays import number

FORMATS = [Format(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def group_losses(weight: mx.array, encoded: Encoded, fmt: Format, weights: mx.array | None) -> mx.array:
    error = (fmt.decode(encoded.arrays()) - weight.astype(mx.float32)).reshape(*weight.shape[:-1], -1, fmt.group_size)
    return (error * error * (1 if weights is None else weights)).sum(axis=-1)


def heavy_tailed(shape: tuple[int, ...], seed: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    normal = mx.random.normal(shape, key=mx.random.key(seed))
    return (0.02 * normal * mx.exp(0.5 * mx.random.normal(shape, key=mx.random.key(seed + 1)))).astype(dtype)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_no_group_is_worse_than_min_max(fmt: Format, dtype: mx.Dtype) -> None:
    weight = heavy_tailed((16, 256), seed=fmt.bits, dtype=dtype)
    importance = mx.exp(2 * mx.random.normal((256,), key=mx.random.key(9)))
    weights = group_weights(importance, fmt)
    fitted = group_losses(weight, affine_fit(weight, fmt, importance), fmt, weights)
    rounded = group_losses(weight, round_to_nearest(weight, fmt), fmt, weights)
    assert bool((fitted <= rounded * (1 + 1e-4) + 1e-14).all())
    assert number(fitted.sum()) < 0.97 * number(rounded.sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_no_group_is_worse_than_its_own_range(bits: int) -> None:
    """Codes from the least weight of a group to the largest: what mx.quantize shifts so that zero is exact."""
    weight, fmt = heavy_tailed((64, 256), seed=bits), Format(bits, 64)
    groups = weight.astype(mx.float32).reshape(64, -1, 64)
    low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale, bias = ((high - low) / (2**bits - 1)).astype(mx.bfloat16), low.astype(mx.bfloat16)
    grid = Grid(scale.astype(mx.float32), bias.astype(mx.float32))
    error = groups - (nearest_codes(groups, grid, bits) * grid.scale + grid.bias)
    fitted = group_losses(weight, affine_fit(weight, fmt), fmt, None)
    assert bool((fitted <= (error * error).sum(axis=-1) * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_a_grid_that_is_there_is_found(bits: int) -> None:
    """Weights that are ``scale * q + bias`` with both end codes used, as Q4_1's are, come back almost exactly."""
    key = mx.random.split(mx.random.key(bits), 3)
    codes = mx.random.randint(0, 2**bits, (64, 8, 32), key=key[0])
    codes = mx.concatenate([mx.zeros((64, 8, 1)), mx.full((64, 8, 1), 2**bits - 1), codes[..., 2:]], axis=-1)
    scale = mx.random.uniform(0.01, 0.02, (64, 8, 1), key=key[1]).astype(mx.float16).astype(mx.float32)
    low = -scale * 2 ** (bits - 1) * mx.random.uniform(0.8, 1.2, (64, 8, 1), key=key[2])
    weight = (codes * scale + low.astype(mx.float16).astype(mx.float32)).reshape(64, 256)
    fmt = Format(bits, 32)
    ours = fmt.decode(affine_fit(weight, fmt, dtype=mx.float16).arrays()) - weight
    theirs = fmt.decode(round_to_nearest(weight, fmt).arrays()) - weight
    assert number(mx.linalg.norm(ours)) < 0.1 * number(mx.linalg.norm(theirs))


def test_weights_move_the_error_to_columns_that_matter_less() -> None:
    fmt = Format(3, 64)
    weight = heavy_tailed((64, 64), seed=3)
    importance = mx.where(mx.arange(64) < 8, 20.0, 1.0)
    plain, weighted = (
        fmt.decode(affine_fit(weight, fmt, h).arrays()) - weight.astype(mx.float32) for h in (None, importance)
    )
    assert number((weighted[:, :8] ** 2).sum()) < 0.8 * number((plain[:, :8] ** 2).sum())


def weighted_loss(weight: mx.array, fmt: Format, importance: mx.array) -> float:
    fitted = affine_fit(weight, fmt, importance)
    return number(group_losses(weight, fitted, fmt, group_weights(importance, fmt)).sum())


@pytest.mark.parametrize(("bits", "left"), [(3, 0.01), (4, 0.003)])
def test_the_refits_come_near_to_all_that_refits_give(bits: int, left: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One refit less would leave more than ``left`` of the loss, and more of them gain no more than that."""
    weight, fmt = heavy_tailed((128, 256), seed=bits), Format(bits, 64)
    importance = mx.exp(mx.random.normal((256,), key=mx.random.key(9)))
    ours = weighted_loss(weight, fmt, importance)
    monkeypatch.setattr(affine_fit_module, "REFITS", 10)
    converged = weighted_loss(weight, fmt, importance)
    monkeypatch.setattr(affine_fit_module, "REFITS", 2)
    assert converged <= ours < (1 + left) * converged < weighted_loss(weight, fmt, importance)


@pytest.mark.parametrize(("bits", "gain"), [(2, 1.01), (3, 1.025), (4, 1.018), (5, 1.012), (6, 1.005)])
def test_clipped_ranges_pay(bits: int, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = heavy_tailed((128, 256), seed=bits), Format(bits, 64)
    ours = weighted_loss(weight, fmt, mx.ones(256))
    monkeypatch.setattr(affine_fit_module, "START_RANGES", {bits: (1.0,)})
    assert weighted_loss(weight, fmt, mx.ones(256)) > gain * ours


def test_columns_the_text_never_reached_are_not_given_up() -> None:
    """A few columns have all the second moment: they gain much, and the others lose a bounded share."""
    fmt = Format(4, 64)
    weight = heavy_tailed((256, 64), seed=4)
    seen = mx.arange(64) < 4
    plain, weighted = (
        fmt.decode(affine_fit(weight, fmt, h).arrays()) - weight.astype(mx.float32)
        for h in (None, mx.where(seen, 1e6, 0.0))
    )
    assert number((weighted[:, :4] ** 2).sum()) < 0.28 * number((plain[:, :4] ** 2).sum())
    assert number((weighted[:, 4:] ** 2).sum()) < 1.7 * number((plain[:, 4:] ** 2).sum())
    assert group_weights(mx.where(seen, 1e6, 0.0), fmt).min().item() == pytest.approx(0.05)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = heavy_tailed((2, 40, 128), seed=5), Format(4, 64)
    importance = mx.random.uniform(0.1, 2, (2, 128), key=mx.random.key(6))
    whole = affine_fit(weight, fmt, importance)
    monkeypatch.setattr(affine_fit_module, "BLOCK_ELEMENTS", 128 * 7)
    blocks = affine_fit(weight, fmt, importance)
    assert all(mx.array_equal(a, blocks.arrays()[name]) for name, a in whole.arrays().items())
    one = affine_fit(weight[1], fmt, importance[1])
    assert all(mx.array_equal(a, whole.arrays()[name][1]) for name, a in one.arrays().items())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 0.37, -1e-6])
def test_constant_groups_survive(bits: int, value: float) -> None:
    weight = mx.full((2, 64), value).astype(mx.bfloat16)
    decoded = Format(bits, 64).decode(affine_fit(weight, Format(bits, 64), mx.zeros(64)).arrays())
    assert mx.allclose(decoded, weight.astype(mx.float32), rtol=4e-3, atol=1e-7)


def test_stored_dtypes() -> None:
    encoded = affine_fit(heavy_tailed((4, 64), seed=7), Format(4, 64))
    assert (encoded.weight.dtype, encoded.scales.dtype) == (mx.uint32, mx.bfloat16)
    assert encoded.biases is not None
    assert encoded.biases.dtype == mx.bfloat16
