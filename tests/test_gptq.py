"""Error feedback must lower the error at the layer's output, and leave formats and layout alone."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxq.methods import gptq as gptq_module
from mlxq.methods.affine_fit import affine_fit
from mlxq.methods.formats import Format
from mlxq.methods.gptq import GPTQ, feedback, gptq, inverse_factor
from tests.arrays import number


def correlated_hessian(columns: int, seed: int) -> mx.array:
    keys = mx.random.split(mx.random.key(seed), 3)
    mixing = mx.random.normal((columns // 4, columns), key=keys[0])
    inputs = mx.random.normal((4 * columns, columns // 4), key=keys[1]) @ mixing
    inputs = inputs + mx.random.normal(inputs.shape, key=keys[2])
    return inputs.T @ inputs / inputs.shape[0]


def output_error(weight: mx.array, decoded: mx.array, hessian: mx.array) -> float:
    change = decoded - weight.astype(mx.float32)
    return number(((change @ hessian) * change).sum())


def weights_of(shape: tuple[int, ...], seed: int) -> mx.array:
    return (0.05 * mx.random.normal(shape, key=mx.random.key(seed))).astype(mx.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_output_error_falls(bits: int, group_size: int) -> None:
    fmt = Format(bits, group_size)
    weight, hessian = weights_of((48, 256), seed=bits), correlated_hessian(256, seed=group_size)
    plain = output_error(weight, fmt.decode(affine_fit(weight, fmt, mx.diagonal(hessian)).arrays()), hessian)
    fed_back = output_error(weight, fmt.decode(gptq(weight, fmt, feedback(hessian, fmt.group_size)).arrays()), hessian)
    # At 8 bits what is left is the rounding of bf16 scales, which feedback cannot mend as well.
    assert fed_back < (0.8 if bits < 8 else 0.95) * plain


def test_factor_is_that_of_the_inverse() -> None:
    hessian = correlated_hessian(64, seed=1)
    factor = inverse_factor(hessian, damping=0.01)
    damped = hessian + 0.01 * mx.diagonal(hessian).mean() * mx.eye(64)
    assert mx.allclose(factor, mx.triu(factor))
    assert mx.allclose(factor.T @ factor @ damped, mx.eye(64), atol=2e-3)


def test_white_inputs_need_no_feedback() -> None:
    """With uncorrelated inputs the columns are independent, and the result is that of ``fit``."""
    weight, fmt = weights_of((16, 128), seed=2), Format(4, 64)
    ours, plain = gptq(weight, fmt, feedback(mx.eye(128), fmt.group_size)), affine_fit(weight, fmt)
    assert mx.array_equal(ours.weight, plain.weight)
    assert mx.array_equal(ours.scales, plain.scales)


def test_experts_are_encoded_each_with_its_own_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = weights_of((3, 16, 128), seed=4), Format(4, 32)
    hessian = mx.stack([correlated_hessian(128, seed) for seed in (5, 6, 7)])
    stacked = gptq(weight, fmt, feedback(hessian, fmt.group_size))
    for expert in range(3):
        alone = gptq(weight[expert], fmt, feedback(hessian[expert], fmt.group_size))
        assert mx.allclose(fmt.decode(stacked.arrays())[expert], fmt.decode(alone.arrays()), atol=1e-3)
    monkeypatch.setattr(gptq_module, "FACTOR_ELEMENTS", 128 * 128)
    assert mx.allclose(
        fmt.decode(gptq(weight, fmt, feedback(hessian, fmt.group_size)).arrays()),
        fmt.decode(stacked.arrays()),
        atol=1e-3,
    )


def test_inputs_never_seen_do_no_harm() -> None:
    weight, fmt = weights_of((16, 128), seed=8), Format(4, 64)
    hessian = correlated_hessian(128, seed=9)
    silent = mx.where((mx.arange(128) < 64)[:, None] | (mx.arange(128) < 64)[None], 0.0, hessian)
    for h in (silent, mx.zeros((128, 128))):
        decoded = fmt.decode(gptq(weight, fmt, feedback(h, fmt.group_size)).arrays())
        assert number(mx.abs(decoded - weight.astype(mx.float32)).max()) < 0.05


def test_groups_and_columns_are_taken_by_falling_second_moment() -> None:
    """What comes first has the most columns after it to make good its error."""
    spread = mx.exp(mx.random.normal((256,), key=mx.random.key(11)))
    hessian = correlated_hessian(256, seed=12) * mx.sqrt(spread[:, None] * spread[None])
    moments = mx.diagonal(hessian)[feedback(hessian, 64).order].reshape(-1, 64)
    assert mx.array_equal(mx.sort(feedback(hessian, 64).order), mx.arange(256))
    assert bool((moments[:, 1:] <= moments[:, :-1]).all())
    means = moments.mean(axis=1)
    assert bool((means[1:] <= means[:-1]).all())


def test_the_order_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt = weights_of((64, 256), seed=13), Format(3, 64)
    spread = mx.exp(2 * mx.random.normal((256,), key=mx.random.key(14)))
    hessian = correlated_hessian(256, seed=15) * mx.sqrt(spread[:, None] * spread[None])
    ours = output_error(weight, fmt.decode(gptq(weight, fmt, feedback(hessian, 64)).arrays()), hessian)
    monkeypatch.setattr(gptq_module, "_group_order", lambda h, group: mx.broadcast_to(mx.arange(256), (1, 256)))
    as_stored = output_error(weight, fmt.decode(gptq(weight, fmt, feedback(hessian, 64)).arrays()), hessian)
    assert ours < 0.95 * as_stored


def test_the_head_that_is_an_embedding_too_keeps_its_rows_nearer() -> None:
    """More damping gives up some of the head's error for rows that look up nearly the same."""
    weight, fmt = weights_of((96, 128), seed=16), Format(3, 64)
    hessian = correlated_hessian(128, seed=17)
    own, tied = (
        fmt.decode(GPTQ.encode(weight, fmt, GPTQ.guide(mx.diagonal(hessian), hessian, fmt, tied=tied)).arrays())
        for tied in (False, True)
    )
    fitted = fmt.decode(affine_fit(weight, fmt, mx.diagonal(hessian)).arrays())

    def row_error(decoded: mx.array) -> float:
        return number(((decoded - weight.astype(mx.float32)) ** 2).sum())

    assert row_error(fitted) < row_error(tied) < 0.8 * row_error(own)
    assert output_error(weight, tied, hessian) < 1.1 * output_error(weight, own, hessian)
    assert output_error(weight, own, hessian) < 0.25 * output_error(weight, fitted, hessian)


def test_grids_are_fitted_to_what_an_error_costs() -> None:
    """Independent inputs of unlike size: nothing can be made good, so it is ``fit`` weighted by second moments."""
    weight, fmt = weights_of((96, 128), seed=20), Format(3, 64)
    moments = mx.exp(mx.random.normal((128,), key=mx.random.key(21)))
    hessian = mx.diag(moments)
    ours, weighted, plain = (
        output_error(weight, fmt.decode(encoded.arrays()), hessian)
        for encoded in (
            gptq(weight, fmt, feedback(hessian, 64)),
            affine_fit(weight, fmt, moments),
            affine_fit(weight, fmt),
        )
    )
    assert ours == pytest.approx(weighted, rel=0.02)
    assert ours < 0.95 * plain


@pytest.mark.parametrize("panel", [4, 64])
def test_panels_only_save_time(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fmt, hessian = weights_of((16, 128), seed=18), Format(4, 64), correlated_hessian(128, seed=19)
    ours = gptq(weight, fmt, feedback(hessian, 64))
    monkeypatch.setattr(gptq_module, "PANEL_COLUMNS", panel)
    other = gptq(weight, fmt, feedback(hessian, 64))
    assert mx.allclose(fmt.decode(ours.arrays()), fmt.decode(other.arrays()), atol=2e-3)
