from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlxq.calibration.text import TextInfo
from mlxq.comparison import charts
from mlxq.comparison.report import comparison_facts, comparison_html, comparison_markdown
from mlxq.comparison.result import Comparison, ModelResult, verdict
from mlxq.metrics.faithfulness import Faithfulness
from mlxq.metrics.size import Size
from mlxq.recipe.gates import check_gates, parse_gate
from mlxq.running.speed import Answer, Speed, SpeedSettings
from mlxq.writing import pictures


def faithful(kl: float) -> Faithfulness:
    per_token = np.full(50, kl, np.float32)
    return Faithfulness(50, kl, kl / 10, kl, 2 * kl, None, 3 * kl, 0.961, 10.21, 10.0, 1.021, 0.003, 0.01, per_token)


def timed(tps: float) -> Speed:
    answer = Answer("Why?", "<b>Because</b> & so", tps, 10**8)
    return Speed(1.0, tps * 5, 1.0, tps, 0.5, 10**8, 2 * 10**8, 10**8, "cpu", SpeedSettings(), 3, (answer,))


def result(name: str, size: int, kl: float | None, tps: float, **more: Any) -> ModelResult:
    held = Size(size, size, 10**6, size * 8 / 10**6, {})
    found = None if kl is None else faithful(kl)
    layers = {"embed_tokens": 4.5, "0": 4.5, "1": 6.5}
    return ModelResult(name, held, layers, found, timed(tps), tied=more.get("tied", False))


@pytest.fixture
def comparison() -> Comparison:
    results = (
        result("original", 3_400_000, None, 10),
        result("B", 1_000_000, 0.05, 19),
        result("<C>", 2_000_000, 0.06, 15),
    )
    return Comparison(
        results, TextInfo("corpus", "ab" * 32, "cd" * 32, 50, 25, 25, ()), faithful(1e-4), ("A note.",), complete=True
    )


def test_pareto_front_leaves_out_what_another_beats_in_both() -> None:
    assert charts.pareto_front([(1, 5), (2, 6), (3, 1), (3, 2), (0.5, math.nan)]) == [0, 2]
    assert charts.pareto_front([]) == []


def test_verdict_is_the_line_a_person_wants(comparison: Comparison) -> None:
    line = verdict(comparison.candidates[0], comparison.reference)
    assert line == "B is 3.4x smaller, 1.9x faster, 96.1% top-1 agreement, perplexity +2.1% ± 0.3%"


def test_page_is_whole_and_asks_no_network(comparison: Comparison) -> None:
    page = comparison_html(comparison, check_gates([parse_gate("kl_mean<0.055")], {"B": {"kl_mean": 0.05}}))
    assert page.count("<svg") == 4
    # Namespaces are names, not addresses, a data: link holds what it shows; nothing else may point out.
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", re.sub(r'xmlns:?\w*="[^"]*"', "", page))
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)
    assert "measured on a CPU" in page
    assert comparison.text.sha256 in page


def test_page_escapes_names_and_answers(comparison: Comparison) -> None:
    page = comparison_html(comparison)
    assert "&lt;b&gt;Because&lt;/b&gt; &amp; so" in page
    assert "<b>Because" not in page
    assert "<C>" not in page


def test_drawing_is_the_same_each_time(comparison: Comparison) -> None:
    one, other = (pictures.as_svg(charts.size_against_kl(comparison)) for _ in range(2))
    assert one == other
    assert pictures.as_png(charts.size_against_kl(comparison)).startswith(b"\x89PNG")


def test_nan_is_shown_and_never_best_and_json_stays_valid(comparison: Comparison) -> None:
    broken = replace(comparison.candidates[0], faithfulness=faithful(math.nan))
    broken_comparison = replace(comparison, results=(comparison.reference, broken, comparison.candidates[1]))
    row = next(line for line in comparison_markdown(broken_comparison).splitlines() if line.startswith("| B "))
    assert "| NaN |" in row
    assert "**NaN" not in row
    facts = json.loads(json.dumps(comparison_facts(broken_comparison), allow_nan=False))
    assert facts["models"][1]["metrics"]["kl_mean"] is None
    assert "kl_mean" in facts["models"][1]["nan"]
    assert "NaN" in comparison_html(broken_comparison)


def test_best_value_of_each_column_is_bold(comparison: Comparison) -> None:
    lines = comparison_markdown(comparison).splitlines()
    assert "**1.0 MB**" in next(line for line in lines if line.startswith("| B "))
    assert "| 2.0 MB |" in next(line for line in lines if line.startswith("| &lt;C>"))


def test_reference_alone_and_no_timing_still_give_a_page(comparison: Comparison) -> None:
    alone = replace(comparison, results=(replace(comparison.reference, speed=None),), complete=False)
    page = comparison_html(alone)
    assert "interrupted" in page
    assert page.count("<svg") == 1
