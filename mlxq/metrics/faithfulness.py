"""How far a model is from its reference on the same tokens: KL divergence, agreement, perplexity.

Everything is fp32 over the whole vocabulary. Of each token only a few scalars are kept, so the text may be
long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.machine.cores import on_cpu, run_rows
from mlxq.metrics.reference import Reference

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# Resamples of the bootstrap and its seed: fixed, so that a report can be made again.
_RESAMPLES = 2000
_SEED = 0
# Fewer tokens than this say nothing about the worst one in a thousand.
_TOKENS_FOR_P999 = 100_000
# Rows of logits handled at a time on a CPU: small enough for its cache.
_ROWS = 8


@dataclass(frozen=True)
class TokenMeasures:
    """One scalar per predicted token, each array (sequences, tokens), float32; NaN where a logit was NaN.

    ``kl`` is KL(reference || candidate) in nats; ``nll_ref`` and ``nll`` are minus the log probability of the
    token that follows; ``agrees`` is 1 where both models put the same token first.
    """

    kl: Floats
    nll_ref: Floats
    nll: Floats
    agrees: Floats


@dataclass(frozen=True)
class Faithfulness:
    """The summary over all tokens. KL in nats; ``_se`` are standard errors from a bootstrap over sequences.

    ``kl_per_token`` (tokens,) float32 is kept for the plot of its distribution. ``kl_p999`` is None under
    100,000 tokens; standard errors are NaN for a single sequence.
    """

    tokens: int
    kl_mean: float
    kl_mean_se: float
    kl_median: float
    kl_p99: float
    kl_p999: float | None
    kl_max: float
    top1_agreement: float
    ppl: float
    ppl_ref: float
    ppl_ratio: float
    ppl_ratio_se: float
    delta_p_rms: float
    kl_per_token: Floats

    def metrics(self) -> dict[str, float | None]:
        """The scalars by metric name."""
        return {k: v for k, v in vars(self).items() if k not in ("tokens", "kl_per_token")}


def measure_tokens(reference: mx.array, candidate: mx.array, targets: mx.array) -> TokenMeasures:
    """Compare fp32 logits (sequences, tokens, vocabulary) of two models; ``targets`` (sequences, tokens)
    follow.

    On a CPU numpy does it, whose exponential is 16 times as fast as that of MLX's CPU backend.
    """
    measure = _measure_with_numpy if on_cpu() else _measure_with_mlx
    return measure(reference, candidate, targets)


def _measure_with_mlx(reference: mx.array, candidate: mx.array, targets: mx.array) -> TokenMeasures:
    import mlx.core as mx
    import numpy as np

    log_p = reference - mx.logsumexp(reference, axis=-1, keepdims=True)
    log_q = candidate - mx.logsumexp(candidate, axis=-1, keepdims=True)
    p = mx.exp(log_p)
    # p log p is 0 where p is: a masked token's -inf - -inf would make it NaN.
    kl = mx.sum(mx.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)
    kl = mx.where(mx.any(mx.isnan(candidate), axis=-1), mx.nan, kl)
    agrees = (mx.argmax(reference, axis=-1) == mx.argmax(candidate, axis=-1)).astype(mx.float32)
    agrees = mx.where(mx.isnan(kl), mx.nan, agrees)
    nll_ref = -mx.take_along_axis(log_p, targets[..., None], axis=-1).squeeze(-1)
    nll = -mx.take_along_axis(log_q, targets[..., None], axis=-1).squeeze(-1)
    mx.eval(kl, agrees, nll_ref, nll)
    return TokenMeasures(*(np.array(a, dtype=np.float32) for a in (kl, nll_ref, nll, agrees)))


def _measure_with_numpy(reference: mx.array, candidate: mx.array, targets: mx.array) -> TokenMeasures:
    import numpy as np

    shape = targets.shape
    vocabulary = reference.shape[-1]
    ref = np.asarray(reference).reshape(-1, vocabulary)
    cand = np.asarray(candidate).reshape(-1, vocabulary)
    next_token = np.asarray(targets).reshape(-1)
    out = np.empty((4, len(next_token)), np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, len(next_token), _ROWS):
            rows = slice(start, start + _ROWS)
            out[:, rows] = _measure_rows(ref[rows], cand[rows], next_token[rows])
    kl, nll_ref, nll, agrees = out.reshape(4, *shape)
    return TokenMeasures(kl=kl, nll_ref=nll_ref, nll=nll, agrees=agrees)


def _measure_rows(ref: Floats, cand: Floats, next_token: Any) -> tuple[Any, Any, Any, Any]:
    """KL, both negative log likelihoods and agreement of a few rows (rows, vocabulary)."""
    import numpy as np

    index = np.arange(len(next_token))
    r, c = ref - ref.max(-1, keepdims=True), cand - cand.max(-1, keepdims=True)
    p = np.exp(r)
    total_p, total_q = p.sum(-1), np.exp(c).sum(-1)
    log_p_total, log_q_total = np.log(total_p), np.log(total_q)
    gap = r - c
    weighted = np.einsum("ij,ij->i", p, gap)
    if not np.isfinite(weighted).all():
        # p log p is 0 where p is: a masked token's -inf - -inf would make it NaN.
        weighted = np.where(p > 0, p * gap, 0).sum(-1)
        weighted[np.isnan(cand).any(-1)] = np.nan
    kl = weighted / total_p - log_p_total + log_q_total
    agrees = np.where(np.isnan(kl), np.nan, ref.argmax(-1) == cand.argmax(-1))
    return kl, log_p_total - r[index, next_token], log_q_total - c[index, next_token], agrees


def measure_faithfulness(
    reference: Reference,
    candidate: nn.Module,
    batches: Sequence[tuple[mx.array, mx.array]],
) -> Generator[int, None, Faithfulness]:
    """Run ``candidate`` over ``batches`` of (tokens, following tokens), as ``reference`` was built on the
    tokens.

    Both are (sequences, length). Yields the tokens of each finished batch and returns the summary. Only one
    batch's logits are in memory at a time.
    """
    import mlx.core as mx

    parts = []
    for number, (tokens, targets) in enumerate(batches):
        ours = run_rows(lambda rows: candidate(rows).astype(mx.float32), tokens)
        parts.append(measure_tokens(reference.logits(number, tokens), ours, targets))
        yield tokens.size
    return summarize(parts)


def summarize(parts: Sequence[TokenMeasures]) -> Faithfulness:
    """Reduce per-token measures (sequences of one length) to the reported numbers, in float64."""
    import numpy as np

    kl, nll_ref, nll, agrees = (
        np.concatenate([getattr(part, name) for part in parts]).astype(np.float64)
        for name in ("kl", "nll_ref", "nll", "agrees")
    )
    change = np.exp(-nll) - np.exp(-nll_ref)
    log_ratio = (nll - nll_ref).mean()
    kl_se, ratio_se = _bootstrap(kl.mean(-1)), _bootstrap((nll - nll_ref).mean(-1), np.exp)
    return Faithfulness(
        tokens=kl.size,
        kl_mean=float(kl.mean()),
        kl_mean_se=kl_se,
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_p999=float(np.quantile(kl, 0.999)) if kl.size >= _TOKENS_FOR_P999 else None,
        kl_max=float(kl.max()),
        top1_agreement=float(agrees.mean()),
        ppl=float(np.exp(nll.mean())),
        ppl_ref=float(np.exp(nll_ref.mean())),
        ppl_ratio=float(np.exp(log_ratio)),
        ppl_ratio_se=ratio_se,
        delta_p_rms=float(np.sqrt((change**2).mean())),
        kl_per_token=kl.reshape(-1).astype(np.float32),
    )


def _bootstrap(per_sequence: Any, statistic: Callable[[Any], Any] = lambda mean: mean) -> float:
    """Standard error of ``statistic`` of the mean over sequences, by resampling whole sequences.

    Tokens of one sequence are correlated, so they are drawn together (Efron & Tibshirani 1993, chapter 8).
    The perplexity ratio is bootstrapped on each sequence's *difference* in log likelihood, which pairs the
    models.
    """
    import numpy as np

    count = len(per_sequence)
    if count < 2:
        return math.nan
    drawn = np.random.default_rng(_SEED).integers(0, count, (_RESAMPLES, count))
    return float(np.std(statistic(per_sequence[drawn].mean(-1)), ddof=1))
