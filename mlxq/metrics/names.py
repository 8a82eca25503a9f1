"""The metrics by name: the same in tables, JSON, gates and documentation."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """``label`` heads a column, ``unit`` is empty for a pure number, ``better`` : ``lower`` or ``higher``."""

    name: str
    label: str
    unit: str
    better: str


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("size_bytes", "size", "bytes", "lower"),
        Metric("bits_per_weight", "bits/weight", "bits", "lower"),
        Metric("load_s", "load", "s", "lower"),
        Metric("prompt_tps", "prompt", "tokens/s", "higher"),
        Metric("generation_tps", "generation", "tokens/s", "higher"),
        Metric("peak_memory_bytes", "peak memory", "bytes", "lower"),
        Metric("load_peak_memory_bytes", "peak loading", "bytes", "lower"),
        Metric("active_memory_bytes", "active memory", "bytes", "lower"),
        Metric("kl_mean", "KL", "nats", "lower"),
        Metric("kl_mean_se", "KL s.e.", "nats", "lower"),
        Metric("kl_median", "KL median", "nats", "lower"),
        Metric("kl_p99", "KL 99%", "nats", "lower"),
        Metric("kl_p999", "KL 99.9%", "nats", "lower"),
        Metric("kl_max", "KL max", "nats", "lower"),
        Metric("top1_agreement", "top-1", "", "higher"),
        Metric("ppl", "perplexity", "", "lower"),
        Metric("ppl_ref", "reference perplexity", "", "lower"),
        Metric("ppl_ratio", "perplexity ratio", "", "lower"),
        Metric("ppl_ratio_se", "ratio s.e.", "", "lower"),
        Metric("delta_p_rms", "RMS change of p", "", "lower"),
    )
}


def value_text(name: str, value: float | None) -> str:
    """A metric as tables show it; an en dash where it was not measured."""
    if value is None:
        return "\u2013"
    if math.isnan(value):
        return "NaN"
    if METRICS[name].unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    if name == "top1_agreement":
        return f"{value:.1%}"
    if name == "ppl_ratio":
        return f"{value - 1:+.2%}"
    if name in ("bits_per_weight", "load_s", "ppl", "ppl_ref"):
        return f"{value:.2f}"
    if METRICS[name].unit == "tokens/s":
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:.4f}"
