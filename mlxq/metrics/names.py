"""The metrics by name: the same in tables, JSON, gates and documentation."""

from __future__ import annotations

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
