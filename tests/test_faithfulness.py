from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxq.comparison.measure import is_tied
from mlxq.metrics import faithfulness
from mlxq.metrics.evaluation import evaluation_model
from mlxq.metrics.faithfulness import (
    Faithfulness,
    TokenMeasures,
    measure_faithfulness,
    measure_tokens,
    summarize,
)
from mlxq.metrics.metric import METRICS
from mlxq.metrics.reference import Reference, build_reference
from tests.tiny import VOCABULARY, finish, tiny_llama, tiny_mixture

Q4 = {"group_size": 32, "bits": 4}


@pytest.fixture
def batches() -> list[tuple[mx.array, mx.array]]:
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (6, 25)).astype(np.int32)
    return [(mx.array(ids[i : i + 2, :-1]), mx.array(ids[i : i + 2, 1:])) for i in range(0, 6, 2)]


def compared(reference: Any, candidate: Any, batches: list[tuple[mx.array, mx.array]]) -> Faithfulness:
    held: Reference = finish(build_reference(reference, [tokens for tokens, _ in batches]))
    found: Faithfulness = finish(measure_faithfulness(held, candidate, batches))
    return found


def random_logits(seed: int, shape: tuple[int, ...] = (2, 9, 50)) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32))


def targets(shape: tuple[int, int] = (2, 9), vocabulary: int = 50) -> mx.array:
    return mx.array(np.random.default_rng(9).integers(0, vocabulary, shape).astype(np.int32))


def test_kl_and_likelihood_equal_the_definition_in_float64() -> None:
    ref, cand, follow = random_logits(0), random_logits(1), targets()
    found = measure_tokens(ref, cand, follow)
    r, c = np.array(ref).astype(np.float64), np.array(cand).astype(np.float64)
    log_p = r - np.log(np.exp(r).sum(-1, keepdims=True))
    log_q = c - np.log(np.exp(c).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=2e-5)
    expected = -np.take_along_axis(log_q, np.array(follow)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.nll, expected, rtol=2e-5)
    np.testing.assert_array_equal(found.agrees, r.argmax(-1) == c.argmax(-1))


def test_the_gpu_arithmetic_gives_the_same_numbers() -> None:
    # The second sequence is the same in both, so that some tokens agree and others do not.
    ref, follow = random_logits(0), targets()
    cand = mx.concatenate([random_logits(1)[:1], ref[1:]])
    one = faithfulness._measure_with_numpy(ref, cand, follow)
    assert 0 < one.agrees.mean() < 1
    other = faithfulness._measure_with_mlx(ref, cand, follow)
    for name in ("kl", "nll_ref", "nll", "agrees"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)
        assert getattr(one, name).dtype == getattr(other, name).dtype == np.float32


@pytest.mark.parametrize("measure", [faithfulness._measure_with_numpy, faithfulness._measure_with_mlx])
def test_masked_tokens_cost_nothing_and_nan_stays_nan(measure: Any) -> None:
    ref, cand = np.array(random_logits(0)), np.array(random_logits(0))
    ref[..., 3], cand[..., 3] = -np.inf, -np.inf
    cand[1, 2, 7] = np.nan
    found = measure(mx.array(ref), mx.array(cand), mx.zeros((2, 9), dtype=mx.int32))
    assert np.isnan(found.kl[1, 2])
    assert np.isnan(found.agrees[1, 2])
    assert np.isnan(found.kl).sum() == 1
    assert np.nanmax(np.abs(found.kl)) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_comparison_with_itself_is_zero(batches: list[tuple[mx.array, mx.array]], tied: bool) -> None:
    found = compared(evaluation_model(tiny_llama(tied=tied)), evaluation_model(tiny_llama(tied=tied)), batches)
    assert found.kl_max == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1
    assert found.ppl_ratio == pytest.approx(1, abs=1e-6)
    assert found.delta_p_rms == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    "quantized",
    [
        Q4,
        {"group_size": 64, "bits": 3},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    ],
)
@pytest.mark.parametrize("resident", [True, False])
def test_fp32_on_dequantized_weights_agrees_with_the_quantized_kernels(
    batches: list[tuple[mx.array, mx.array]], quantized: dict[str, Any], resident: bool
) -> None:
    """The kernels run in fp32: MLX's bf16 CPU ones accumulate in low precision, far above the noise floor."""
    kernels = tiny_llama(quantized=quantized)
    kernels.set_dtype(mx.float32)
    ours = evaluation_model(tiny_llama(quantized=quantized), resident=resident)
    assert compared(ours, kernels, batches).kl_mean < 1e-7
    floor = compared(evaluation_model(tiny_llama()), tiny_llama(), batches)
    of_kernels = compared(evaluation_model(tiny_llama()), kernels, batches)
    of_ours = compared(
        evaluation_model(tiny_llama()),
        evaluation_model(tiny_llama(quantized=quantized), resident=resident),
        batches,
    )
    assert of_ours.kl_mean > 10 * floor.kl_mean
    assert of_ours.kl_mean == pytest.approx(of_kernels.kl_mean, abs=floor.kl_mean / 10)


def test_own_dtype_stands_for_the_models_own_kernels(batches: list[tuple[mx.array, mx.array]]) -> None:
    emulated = evaluation_model(tiny_llama(), own_dtype=True)
    assert emulated(batches[0][0]).dtype == mx.bfloat16
    fp32 = evaluation_model(tiny_llama())
    real = compared(fp32, tiny_llama(), batches)
    ours = compared(evaluation_model(tiny_llama()), emulated, batches)
    assert ours.kl_mean == pytest.approx(real.kl_mean, rel=0.5)


def test_experts_are_dequantized_too(batches: list[tuple[mx.array, mx.array]]) -> None:
    ours = evaluation_model(tiny_mixture())
    assert ours(batches[0][0]).dtype == mx.float32
    assert compared(ours, tiny_mixture(), batches).kl_mean < 5e-3


def test_quantizing_coarser_is_further_away(batches: list[tuple[mx.array, mx.array]]) -> None:
    means = [
        compared(
            evaluation_model(tiny_llama()),
            evaluation_model(tiny_llama(quantized={"group_size": 64, "bits": bits})),
            batches,
        ).kl_mean
        for bits in (8, 4, 2)
    ]
    assert 0 < means[0] < means[1] < means[2]


def test_split_reference_holds_hidden_states_and_gives_its_own_logits(
    batches: list[tuple[mx.array, mx.array]],
) -> None:
    whole = evaluation_model(tiny_llama(tied=True))
    expected = [np.array(whole(tokens)) for tokens, _ in batches]
    held = finish(build_reference(whole, [tokens for tokens, _ in batches]))
    assert held.is_split
    for number, (tokens, _) in enumerate(batches):
        np.testing.assert_allclose(np.array(held.logits(number, tokens)), expected[number], atol=1e-5)


def test_a_model_without_a_separable_body_is_run_whole(batches: list[tuple[mx.array, mx.array]]) -> None:
    class Whole:
        def __init__(self) -> None:
            self.inner = evaluation_model(tiny_llama())

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.inner(tokens)

    held = finish(build_reference(Whole(), [tokens for tokens, _ in batches]))  # type: ignore[arg-type]
    assert not held.is_split
    assert held.logits(0, batches[0][0]).shape == (2, 24, VOCABULARY)


def measures(kl: Any, nll_ref: Any, nll: Any) -> TokenMeasures:
    kl, nll_ref, nll = (np.asarray(a, np.float32) for a in (kl, nll_ref, nll))
    return TokenMeasures(kl=kl, nll_ref=nll_ref, nll=nll, agrees=np.ones_like(kl))


def test_summary_by_hand() -> None:
    found = summarize([measures([[0.0, 0.2], [0.4, 0.6]], [[1, 1], [1, 1]], [[1, 2], [1, 2]])])
    assert found.tokens == 4
    assert found.kl_mean == pytest.approx(0.3)
    assert found.kl_median == pytest.approx(0.3)
    assert found.kl_max == pytest.approx(0.6)
    assert found.ppl_ref == pytest.approx(math.e)
    assert found.ppl_ratio == pytest.approx(math.exp(0.5))
    # Both sequences differ from the reference by the same: pairing leaves no error, whatever their texts.
    assert found.ppl_ratio_se == pytest.approx(0, abs=1e-12)
    assert found.delta_p_rms == pytest.approx((math.exp(-1) - math.exp(-2)) / math.sqrt(2))
    assert found.kl_p999 is None


def test_standard_error_is_that_of_sequences_not_of_tokens() -> None:
    """Tokens of a sequence that all agree carry one observation: the error is s / sqrt(sequences)."""
    level = np.random.default_rng(3).gamma(2, 1, 64)
    kl = np.repeat(level[:, None], 100, axis=1)
    found = summarize([measures(kl, kl, kl)])
    assert found.kl_mean_se == pytest.approx(level.std() / math.sqrt(64), rel=0.1)
    assert summarize([measures(kl, kl, kl)]).kl_mean_se == found.kl_mean_se


def test_one_sequence_has_no_standard_error() -> None:
    assert math.isnan(summarize([measures([[0.1, 0.2]], [[1, 1]], [[1, 1]])]).kl_mean_se)


def test_rarest_tokens_need_a_long_text() -> None:
    kl = np.zeros((100, 1000))
    kl[:, 0] = 1
    assert summarize([measures(kl, kl, kl)]).kl_p999 is not None
    assert summarize([measures(kl[:99], kl[:99], kl[:99])]).kl_p999 is None


def test_percentiles_lie_between_the_tokens_they_fall_between() -> None:
    """The 99% point of n sorted values is at 0.99 (n - 1), between neighbours in a straight line."""
    kl = np.random.default_rng(5).permutation(np.arange(100_000, dtype=np.float64)).reshape(200, 500) / 1e5
    found = summarize([measures(part, part, part) for part in np.split(kl, 4)])
    assert found.kl_p99 == pytest.approx(0.99 * 99_999 / 1e5, rel=1e-6)
    assert found.kl_p999 == pytest.approx(0.999 * 99_999 / 1e5, rel=1e-6)
    assert found.kl_median == pytest.approx(0.5 * 99_999 / 1e5, rel=1e-6)
    assert found.kl_max == pytest.approx(0.99999, rel=1e-6)
    assert found.tokens == 100_000


def test_the_error_of_the_ratio_is_that_of_paired_sequences() -> None:
    """By the delta method: the ratio times the standard error of the mean difference in log likelihood."""
    noise = np.random.default_rng(8)
    text, change = noise.gamma(2, 1, (400, 1)), noise.normal(0.1, 0.05, (400, 1))
    found = summarize([measures(change**2, text, text + change)])
    expected = found.ppl_ratio * change.std() / math.sqrt(400)
    assert found.ppl_ratio_se == pytest.approx(expected, rel=0.1)
    assert found.ppl == pytest.approx(float(np.exp((text + change).mean())), rel=1e-5)
    assert found.ppl_ratio == pytest.approx(found.ppl / found.ppl_ref)


def test_agreement_is_the_share_of_tokens() -> None:
    kl = np.zeros((2, 2), np.float32)
    agrees = np.array([[1, 0], [1, 1]], np.float32)
    assert summarize([TokenMeasures(kl=kl, nll_ref=kl, nll=kl, agrees=agrees)]).top1_agreement == 0.75


def test_metrics_are_the_scalars_and_the_tokens_stay_for_the_plot() -> None:
    found = summarize([measures([[0.0, 0.2], [0.4, 0.6]], [[1, 1], [1, 1]], [[1, 2], [1, 2]])])
    assert set(found.metrics()) <= set(METRICS)
    assert found.metrics()["kl_mean"] == found.kl_mean
    assert found.kl_per_token.dtype == np.float32
    np.testing.assert_allclose(found.kl_per_token, [0.0, 0.2, 0.4, 0.6], rtol=1e-6)


def test_logits_a_thousand_apart_neither_overflow_nor_lose_anything() -> None:
    ref, cand = np.array(random_logits(0)) + 1000, np.array(random_logits(1)) - 1000
    far, near = (
        measure_tokens(mx.array(a), mx.array(b), targets())
        for a, b in ((ref, cand), (np.array(random_logits(0)), np.array(random_logits(1))))
    )
    for name in ("kl", "nll_ref", "nll"):
        np.testing.assert_allclose(getattr(far, name), getattr(near, name), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(far.agrees, near.agrees)


@pytest.mark.parametrize(("kl_mean", "tied"), [(0.0019, True), (0.002, True), (0.0021, False)])
def test_tied_is_within_two_standard_errors_of_the_noise_floor(kl_mean: float, tied: bool) -> None:
    zeros = summarize([measures([[0.0]], [[1.0]], [[1.0]])])
    floor = replace(zeros, kl_mean=0.001, kl_mean_se=0.0005)
    assert is_tied(replace(zeros, kl_mean=kl_mean), floor) == tied


def test_nan_logits_are_reported_as_nan(batches: list[tuple[mx.array, mx.array]]) -> None:
    broken = evaluation_model(tiny_llama())
    broken.model.norm.weight = broken.model.norm.weight * mx.nan
    found = compared(evaluation_model(tiny_llama()), broken, batches)
    assert all(math.isnan(v) for v in (found.kl_mean, found.kl_p99, found.kl_max, found.ppl, found.top1_agreement))
