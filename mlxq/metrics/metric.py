"""The metrics, a row each: the same in tables, pages, cards, JSON, gates and documentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

_NOT_MEASURED = "\u2013"


@dataclass(frozen=True)
class Metric:
    """One metric and everything that is said of it anywhere. Adding one is a row of ``METRICS``.

    ``label`` heads a column; ``unit`` is empty for a pure number; ``better`` is ``lower`` or ``higher``. ``text``
    shows a finite value. ``error`` names the metric that is its standard error, shown by ``error_text``. ``table`` is
    the table of ``compare`` it stands in (``cost`` or ``distance``), ``page`` whether reports have a column of it,
    ``card`` what a model card calls it; None and False where it is shown in JSON and gates alone.
    """

    name: str
    label: str
    unit: str
    better: str
    text: Callable[[float], str]
    error: str | None = None
    error_text: Callable[[float], str] = "{:.1g}".format
    table: str | None = None
    page: bool = False
    card: str | None = None


def _bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _small(value: float) -> str:
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.4f}"


def _change(value: float) -> str:
    return f"{value - 1:+.2%}"


_two = "{:.2f}".format
_share = "{:.1%}".format

# In the order of every table, page and card.
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("size_bytes", "size", "bytes", "lower", _bytes, table="cost", page=True),
        Metric("bits_per_weight", "bits/weight", "bits", "lower", _two, table="cost", page=True),
        Metric(
            "generation_tps",
            "generation",
            "tokens/s",
            "higher",
            _rate,
            table="cost",
            page=True,
            card="Generation, tokens/s",
        ),
        Metric("prompt_tps", "prompt", "tokens/s", "higher", _rate, table="cost", page=True, card="Prompt, tokens/s"),
        Metric(
            "peak_memory_bytes", "peak memory", "bytes", "lower", _bytes, table="cost", page=True, card="Peak memory"
        ),
        Metric("load_s", "load", "s", "lower", _two, table="cost", page=True),
        Metric("load_peak_memory_bytes", "peak loading", "bytes", "lower", _bytes),
        Metric("active_memory_bytes", "active memory", "bytes", "lower", _bytes),
        Metric(
            "kl_mean",
            "KL",
            "nats",
            "lower",
            _small,
            "kl_mean_se",
            table="distance",
            page=True,
            card="KL divergence from the original, mean per token, nats",
        ),
        Metric("kl_mean_se", "KL s.e.", "nats", "lower", _small),
        Metric("kl_median", "KL median", "nats", "lower", _small, table="distance"),
        Metric(
            "kl_p99",
            "KL 99%",
            "nats",
            "lower",
            _small,
            table="distance",
            page=True,
            card="KL divergence, 99% of tokens are below, nats",
        ),
        Metric("kl_p999", "KL 99.9%", "nats", "lower", _small),
        Metric("kl_max", "KL max", "nats", "lower", _small),
        Metric(
            "top1_agreement",
            "top-1",
            "",
            "higher",
            _share,
            table="distance",
            page=True,
            card="Most likely token is the original's",
        ),
        Metric("ppl", "perplexity", "", "lower", _two, table="distance", page=True, card="Perplexity"),
        Metric("ppl_ref", "reference perplexity", "", "lower", _two),
        Metric(
            "ppl_ratio",
            "perplexity ratio",
            "",
            "lower",
            _change,
            "ppl_ratio_se",
            "{:.2%}".format,
            table="distance",
            page=True,
            card="Perplexity, change from the original",
        ),
        Metric("ppl_ratio_se", "ratio s.e.", "", "lower", _small),
        Metric("delta_p_rms", "RMS change of p", "", "lower", _small),
    )
}


def chosen(wanted: Callable[[Metric], bool], measured: Iterable[Mapping[str, float | None]]) -> list[Metric]:
    """The rows that ``wanted`` takes and that at least one model has a value of."""
    models = list(measured)
    return [row for row in METRICS.values() if wanted(row) and any(m.get(row.name) is not None for m in models)]


def value_text(name: str, value: float | None) -> str:
    """A metric as tables show it; an en dash where it was not measured."""
    if value is None:
        return _NOT_MEASURED
    return "NaN" if math.isnan(value) else METRICS[name].text(value)


def with_error_text(name: str, metrics: Mapping[str, float | None]) -> str:
    """A metric as tables show it, with its standard error where it has one."""
    row, value = METRICS[name], metrics.get(name)
    error = metrics.get(row.error) if row.error else None
    text = value_text(name, value)
    if value is None or error is None or not math.isfinite(value) or not math.isfinite(error):
        return text
    return f"{text} \u00b1 {row.error_text(error)}"
