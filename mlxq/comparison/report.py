"""A comparison as data (JSON), as Markdown and as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlxq import __version__
from mlxq.budget.scoring import Remark
from mlxq.clean import clean, clean_line
from mlxq.comparison.measure import Candidate
from mlxq.comparison.result import Comparison, ModelResult, verdict
from mlxq.metrics.metric import METRICS, Metric, chosen, value_text, with_error_text
from mlxq.recipe.gates import GateResult
from mlxq.writing.report import FILE_NAME, read_report, write_report

SCHEMA = "mlxq.comparison"
SCHEMA_VERSION = 1
_HISTOGRAM_EDGES = tuple(10 ** (exponent / 4) for exponent in range(-28, 9))


def comparison_facts(comparison: Comparison, gates: Sequence[GateResult] = ()) -> dict[str, Any]:
    """The comparison as JSON data, versioned. A NaN becomes null, and is named in the model's ``nan``."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "mlxq": __version__,
        "complete": comparison.complete,
        "reference": comparison.reference.name,
        "text": comparison.text.facts(),
        "noise_floor": _finite(comparison.noise_floor.metrics()),
        "notes": list(comparison.notes),
        "models": [_model_facts(result, comparison) for result in comparison.results],
        "gates": [
            {"model": g.model, "gate": g.gate.text, "value": _number(g.value), "passed": g.passed} for g in gates
        ],
    }


def _model_facts(result: ModelResult, comparison: Comparison) -> dict[str, Any]:
    metrics = result.metrics()
    facts: dict[str, Any] = {
        "name": result.name,
        "metrics": _finite(metrics),
        "nan": sorted(name for name, value in metrics.items() if value is not None and math.isnan(value)),
        "tied_with_reference": result.tied,
        "layer_bits": dict(result.layer_bits),
    }
    if result is not comparison.reference:
        facts["verdict"] = verdict(result, comparison.reference)
    if result.not_timed is not None:
        facts["not_timed"] = result.not_timed
    if speed := result.speed:
        facts["timing"] = {
            "device": speed.device,
            "trials": speed.trials,
            "prompt_tps_spread": speed.prompt_tps_spread,
            "generation_tps_spread": speed.generation_tps_spread,
            "settings": dict(vars(speed.settings)),
        }
        facts["answers"] = [dict(vars(answer)) for answer in speed.answers]
    if found := result.faithfulness:
        facts["kl_histogram"] = _histogram(found.kl_per_token)
    return facts


def candidate_facts(result: ModelResult, comparison: Comparison) -> dict[str, Any]:
    """What one model's ``mlxq.json`` keeps of a comparison: its own metrics, and what they were measured against."""
    return {
        "reference": comparison.reference.name,
        "text": comparison.text.facts(),
        "noise_floor_kl_mean": _number(comparison.noise_floor.kl_mean),
        "notes": list(comparison.notes),
        **_model_facts(result, comparison),
    }


def _histogram(kl: Any) -> dict[str, Any]:
    """Counts of tokens by KL divergence: below the first edge, between edges, above the last."""
    import numpy as np

    edges = np.array(_HISTOGRAM_EDGES)
    finite = kl[np.isfinite(kl)]
    counts = np.bincount(np.searchsorted(edges, finite), minlength=len(edges) + 1)
    return {"edges": [float(edge) for edge in edges], "counts": counts.tolist()}


def _finite(metrics: dict[str, float | None]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in metrics.items() if value is not None}


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def shown_columns(comparison: Comparison) -> list[Metric]:
    """The metrics of a report that at least one model has."""
    return chosen(lambda metric: metric.page, [result.metrics() for result in comparison.results])


def best_names(comparison: Comparison, column: str) -> set[str]:
    """The models with the best value of a column; all that are tied with the reference where it is the KL.

    Empty where fewer than two models have a value, as there is nothing to win.
    """
    found = {r.name: r.metrics().get(column) for r in comparison.results}
    values = {name: value for name, value in found.items() if value is not None and not math.isnan(value)}
    if len(values) < 2:
        return set()
    pick = min if METRICS[column].better == "lower" else max
    best = pick(values.values())
    winners = {name for name, value in values.items() if value == best}
    tied = {r.name for r in comparison.candidates if r.tied}
    return winners | tied if column.startswith("kl_") and winners & tied else winners


def comparison_markdown(comparison: Comparison, gates: Sequence[GateResult] = ()) -> str:
    """A table for a model card or a pull request, best values in bold, and what a reader needs to redo it."""
    columns = shown_columns(comparison)
    lines = [
        "| model | " + " | ".join(metric.label for metric in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for result in comparison.results:
        cells = []
        for metric in columns:
            text = with_error_text(metric.name, result.metrics())
            cells.append(f"**{text}**" if result.name in best_names(comparison, metric.name) else text)
        mark = " (reference)" if result is comparison.reference else " (tied)" if result.tied else ""
        lines.append(f"| {_escaped(result.name)}{mark} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- {_escaped(verdict(result, comparison.reference))}." for result in comparison.candidates]
    lines += [f"- Gate {'passed' if g.passed else 'FAILED'}: {_escaped(str(g))}." for g in gates]
    lines += ["", " ".join(map(_escaped, footnotes(comparison))), ""]
    return "\n".join(lines)


def footnotes(comparison: Comparison) -> list[str]:
    """What was measured on what, how far the noise goes, and why a speed is missing."""
    text, floor = comparison.text, comparison.noise_floor
    return [
        f"Text: {text.name}, {text.tokens} tokens, SHA-256 {text.sha256[:16]}.",
        f"KL is KL(reference || model) per token, nats; noise floor {value_text('kl_mean', floor.kl_mean)}.",
        *comparison.notes,
        *(f"{r.name}: speed not measured: {r.not_timed}." for r in comparison.results if r.not_timed is not None),
    ]


def _escaped(text: str) -> str:
    return clean_line(text).replace("|", "\\|").replace("<", "&lt;")


def comparison_html(comparison: Comparison, gates: Sequence[GateResult] = ()) -> str:
    """The whole comparison as one HTML page with its drawings inside; it asks nothing of any network."""
    import jinja2

    from mlxq.comparison import charts
    from mlxq.writing import pictures

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mlxq.comparison"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    columns = shown_columns(comparison)
    rows = [
        {
            "name": result.name,
            "is_reference": result is comparison.reference,
            "tied": result.tied,
            "cells": [
                {
                    "text": with_error_text(metric.name, result.metrics()),
                    "best": result.name in best_names(comparison, metric.name),
                }
                for metric in columns
            ],
        }
        for result in comparison.results
    ]
    bars = charts.speed_bars(comparison)
    device = next((r.speed.device for r in comparison.results if r.speed), "")
    page = environment.get_template("compare.html").render(
        comparison=comparison,
        headings=[metric.label for metric in columns],
        rows=rows,
        verdicts=[verdict(result, comparison.reference) for result in comparison.candidates],
        gates=gates,
        main_plot=pictures.as_svg(charts.size_against_kl(comparison)) if comparison.candidates else None,
        bars=pictures.as_svg(bars) if bars else None,
        device=device,
        strip=pictures.as_svg(charts.layer_strip(comparison)),
        distribution=pictures.as_svg(charts.kl_distribution(comparison)) if comparison.candidates else None,
        curves=[(r.name, pictures.as_svg(pictures.size_kl_curve(r.budget))) for r in comparison.candidates if r.budget],
        prompts=_answers_by_prompt(comparison),
        footnotes=footnotes(comparison),
        version=__version__,
    )
    return clean(page)


def _answers_by_prompt(comparison: Comparison) -> list[dict[str, Any]]:
    timed = [(result.name, result.speed) for result in comparison.results if result.speed and result.speed.answers]
    if not timed:
        return []
    return [
        {
            "prompt": answer.prompt,
            "answers": [
                {
                    "model": name,
                    "text": speed.answers[index].text,
                    "tps": f"{speed.answers[index].generation_tps:.1f}",
                    "memory": value_text("peak_memory_bytes", speed.answers[index].peak_memory_bytes),
                }
                for name, speed in timed
            ],
        }
        for index, answer in enumerate(timed[0][1].answers)
    ]


def keep_result(comparison: Comparison, models: Sequence[Candidate]) -> Remark | None:
    """Put the newest result into the ``mlxq.json`` beside the model, where it has one; returns why that failed."""
    newest = models[len(comparison.results) - 1]
    if newest is models[0] or newest.folder is None or not (newest.folder / FILE_NAME).is_file():
        return None
    report = read_report(newest.folder / FILE_NAME)
    report["comparison"] = candidate_facts(comparison.results[-1], comparison)
    # A read-only folder (the Hub's cache, say) is measured all the same.
    try:
        write_report(report, newest.folder)
    except PermissionError:
        return None
    except OSError as exc:
        return Remark(f"{newest.folder / FILE_NAME} does not say what was measured: {exc.strerror}")
    return None
