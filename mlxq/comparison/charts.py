"""The pictures of a comparison, drawn with matplotlib as SVG or PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlxq.comparison.measure import Comparison, ModelResult
from mlxq.writing.pictures import COLORS, GREY, label_axes, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by people with any kind of colour vision. Grey is for the reference.


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (lower is better), by the first.

    Points with a NaN are never on it.
    """
    front: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not any(math.isnan(value) for value in points[index]) and points[index][1] < best:
            front.append(index)
            best = points[index][1]
    return front


def size_against_kl(comparison: Comparison) -> Figure:
    """The main plot: size on disk against mean KL divergence, with the Pareto front and the noise floor."""
    figure, axes = new_figure(7.6, 4.6)
    drawn = [r for r in comparison.candidates if r.faithfulness and math.isfinite(r.faithfulness.kl_mean)]
    floor = comparison.noise_floor.kl_mean
    points = [(r.size.size_bytes / 1e6, max(_kl(r), 1e-9)) for r in drawn]
    front = [points[i] for i in pareto_front(points)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=1, label="Pareto front")
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(points)), key=lambda i: points[i]))}
    for index, (result, (size, kl), color) in enumerate(zip(drawn, points, _colors(comparison), strict=False)):
        error = result.faithfulness.kl_mean_se if result.faithfulness else 0
        axes.errorbar(size, kl, yerr=2 * error if math.isfinite(error) else 0, fmt="o", color=color, capsize=2)
        # Neighbours by size have their names above and below in turn, so that close points stay legible.
        shift = (6, 5) if ranks[index] % 2 == 0 else (-4, -13)
        axes.annotate(plain(result.name), (size, kl), xytext=shift, textcoords="offset points", fontsize=8.5)
    if math.isfinite(floor) and floor > 0:
        axes.axhline(floor, color=GREY, linewidth=1, linestyle=":", label="noise floor")
    if points or floor > 0:
        axes.set_yscale("log")
    axes.margins(x=0.16, y=0.12)
    label_axes(axes, "size of the weights, MB", "mean KL divergence from the reference, nats")
    return figure


def _kl(result: ModelResult) -> float:
    return result.faithfulness.kl_mean if result.faithfulness else math.nan


def speed_bars(comparison: Comparison) -> Figure | None:
    """Generation and prompt speed and peak memory of every timed model, or None where none was."""
    timed = [(r, r.speed) for r in comparison.results if r.speed]
    if not timed:
        return None
    figure, all_axes = new_figure(9.6, 0.9 + 0.34 * len(timed), columns=3)
    names = [result.name for result, _ in timed]
    shown = [plain(name) for name in names]
    panels = (
        (
            "generation, tokens/s",
            [s.generation_tps for _, s in timed],
            [s.generation_tps_spread for _, s in timed],
        ),
        ("prompt, tokens/s", [s.prompt_tps for _, s in timed], [s.prompt_tps_spread for _, s in timed]),
        ("peak memory, MB", [s.peak_memory_bytes / 1e6 for _, s in timed], None),
    )
    palette = dict(zip((r.name for r in comparison.candidates), _colors(comparison), strict=False))
    for axes, (title, values, spread) in zip(all_axes, panels, strict=True):
        colors = [palette.get(name, GREY) for name in names]
        bars = axes.barh(range(len(names)), values, xerr=spread, color=colors, height=0.62)
        axes.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
        axes.set_yticks(range(len(names)), shown if axes is all_axes[0] else [""] * len(names), fontsize=8.5)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set_title(title, fontsize=9, loc="left")
    return figure


def layer_strip(comparison: Comparison) -> Figure:
    """Bits per weight of each layer: one row per model, one cell per layer."""
    import numpy as np

    labels = list(dict.fromkeys(label for r in comparison.results for label in r.layer_bits))
    table = np.array([[r.layer_bits.get(label, math.nan) for label in labels] for r in comparison.results])
    figure, axes = new_figure(9.6, 0.9 + 0.34 * len(comparison.results))
    # Above 8 bits a weight is not quantized: one colour is enough for all of that.
    axes.imshow(np.minimum(table, 9), aspect="auto", cmap="viridis", vmin=2, vmax=9)
    for (row, column), bits in np.ndenumerate(table):
        if math.isfinite(bits):
            axes.text(
                column, row, f"{bits:.3g}", ha="center", va="center",
                fontsize=min(8, 260 / max(len(labels), 1)), color="white" if bits < 6 else "black",
            )  # fmt: skip
    axes.set_xticks(
        range(len(labels)),
        [plain(label) for label in labels],
        fontsize=min(8, 300 / max(len(labels), 1)),
        rotation=45 if len(labels) > 12 else 0,
    )
    axes.set_yticks(range(len(comparison.results)), [plain(r.name) for r in comparison.results], fontsize=8.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def kl_distribution(comparison: Comparison) -> Figure:
    """How the KL divergence of single tokens is distributed: for each value, the share of tokens above it."""
    import numpy as np

    figure, axes = new_figure(7.6, 3.6)
    for result, color in zip(comparison.candidates, _colors(comparison), strict=False):
        if result.faithfulness is None:
            continue
        kl = np.sort(result.faithfulness.kl_per_token[np.isfinite(result.faithfulness.kl_per_token)])
        if not len(kl):
            continue
        # A few hundred points draw the same curve as a hundred thousand.
        picked = np.unique(
            np.concatenate([np.linspace(0, len(kl) - 1, 300).astype(int), np.arange(max(0, len(kl) - 50), len(kl))])
        )
        axes.plot(
            np.maximum(kl[picked], 1e-7), 1 - picked / len(kl), color=color, label=plain(result.name), linewidth=1.5
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    label_axes(axes, "KL divergence of a token, nats", "share of tokens above")
    return figure


def _colors(comparison: Comparison) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(comparison.candidates))]
