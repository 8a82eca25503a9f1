"""The pictures of a comparison, drawn with matplotlib as SVG or PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxq.clean import clean, clean_line
from mlxq.comparison.measure import Comparison, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by people with any kind of colour vision. Grey is for the reference.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5B4B8A")
_GREY = "#7A7A7A"


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
    figure, axes = _figure(7.6, 4.6)
    drawn = [r for r in comparison.candidates if r.faithfulness and math.isfinite(r.faithfulness.kl_mean)]
    floor = comparison.noise_floor.kl_mean
    points = [(r.size.size_bytes / 1e6, max(_kl(r), 1e-9)) for r in drawn]
    front = [points[i] for i in pareto_front(points)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=_GREY, linewidth=1, zorder=1, label="Pareto front")
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(points)), key=lambda i: points[i]))}
    for index, (result, (size, kl), color) in enumerate(zip(drawn, points, _colors(comparison), strict=False)):
        error = result.faithfulness.kl_mean_se if result.faithfulness else 0
        axes.errorbar(size, kl, yerr=2 * error if math.isfinite(error) else 0, fmt="o", color=color, capsize=2)
        # Neighbours by size have their names above and below in turn, so that close points stay legible.
        shift = (6, 5) if ranks[index] % 2 == 0 else (-4, -13)
        axes.annotate(_name(result.name), (size, kl), xytext=shift, textcoords="offset points", fontsize=8.5)
    if math.isfinite(floor) and floor > 0:
        axes.axhline(floor, color=_GREY, linewidth=1, linestyle=":", label="noise floor")
    if points or floor > 0:
        axes.set_yscale("log")
    axes.margins(x=0.16, y=0.12)
    _label(axes, "size of the weights, MB", "mean KL divergence from the reference, nats")
    return figure


def _kl(result: ModelResult) -> float:
    return result.faithfulness.kl_mean if result.faithfulness else math.nan


def speed_bars(comparison: Comparison) -> Figure | None:
    """Generation and prompt speed and peak memory of every timed model, or None where none was."""
    timed = [(r, r.speed) for r in comparison.results if r.speed]
    if not timed:
        return None
    figure, all_axes = _figure(9.6, 0.9 + 0.34 * len(timed), columns=3)
    names = [result.name for result, _ in timed]
    shown = [_name(name) for name in names]
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
        colors = [palette.get(name, _GREY) for name in names]
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
    figure, axes = _figure(9.6, 0.9 + 0.34 * len(comparison.results))
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
        [_name(label) for label in labels],
        fontsize=min(8, 300 / max(len(labels), 1)),
        rotation=45 if len(labels) > 12 else 0,
    )
    axes.set_yticks(range(len(comparison.results)), [_name(r.name) for r in comparison.results], fontsize=8.5)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def kl_distribution(comparison: Comparison) -> Figure:
    """How the KL divergence of single tokens is distributed: for each value, the share of tokens above it."""
    import numpy as np

    figure, axes = _figure(7.6, 3.6)
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
            np.maximum(kl[picked], 1e-7), 1 - picked / len(kl), color=color, label=_name(result.name), linewidth=1.5
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _label(axes, "KL divergence of a token, nats", "share of tokens above")
    return figure


def one_model(measured: Mapping[str, Any]) -> Figure:
    """What a model card shows of one comparison: bits of each layer, and the KL divergence of single tokens.

    ``measured`` is what ``mlxq.json`` keeps of a comparison.
    """
    figure, (left, right) = _figure(9.6, 3.2, columns=2)
    layers = measured["layer_bits"]
    left.bar(range(len(layers)), list(layers.values()), color=_COLORS[0], width=0.8)
    step = max(1, len(layers) // 12)
    left.set_xticks(
        range(0, len(layers), step), [_name(label) for label in layers][::step], rotation=45 if len(layers) > 6 else 0
    )
    left.set_xlabel("layer")
    left.set_ylabel("bits per weight")
    edges, counts = measured["kl_histogram"]["edges"], measured["kl_histogram"]["counts"]
    total = max(sum(counts), 1)
    above = [sum(counts[index + 1 :]) / total for index in range(len(edges))]
    shown = [(edge, share) for edge, share in zip(edges, above, strict=True) if share > 0]
    if shown:
        right.plot(*zip(*shown, strict=True), color=_COLORS[1], linewidth=1.5)
        right.set_xscale("log")
        right.set_yscale("log")
    right.set_xlabel("KL divergence of a token, nats")
    right.set_ylabel("share of tokens above")
    return figure


def size_kl_curve(spent: Mapping[str, Any]) -> Figure:
    """The size-KL curve of a budget: predicted at every point, measured at some, with the chosen point and rivals.

    ``spent`` is ``Spending.facts()``, as ``mlxq.json`` holds it under ``budget``.
    """
    figure, axes = _figure(7.6, 4.6)
    predicted = [(point["weight_bytes"] / 1e6, max(point["predicted_kl"], 1e-9)) for point in spent["curve"]]
    name = "predicted" if spent["text"] else "relative error of weights"
    axes.plot(*zip(*predicted, strict=True), color=_COLORS[0], linewidth=1.5, marker=".", label=name)
    measured = [
        (point["weight_bytes"] / 1e6, point["measured_kl"], 2 * point["measured_kl_se"])
        for point in spent["curve"]
        if point["measured_kl"]
    ]
    if measured:
        sizes, values, errors = zip(*measured, strict=True)
        label = "measured on held-out text"
        axes.errorbar(sizes, values, yerr=errors, fmt="s", color=_COLORS[1], capsize=2, label=label)
    for check in spent["checks"]:
        point = (check["weight_bytes"] / 1e6, max(check["kl_mean"], 1e-9))
        if check["chosen"]:
            axes.plot(*point, marker="*", markersize=13, color=_COLORS[2], linestyle="", label="chosen, measured")
        elif check["name"].startswith(("uniform", "mixed")):
            axes.plot(*point, marker="o", color=_GREY, linestyle="")
            axes.annotate(_name(check["name"]), point, xytext=(6, 5), textcoords="offset points", fontsize=8.5)
    axes.set_yscale("log")
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("mean KL divergence from the original, nats" if spent["text"] else "sum of relative errors")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def drawn(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a ``.svg`` or ``.png`` file."""
    return as_png(figure) if suffix == ".png" else as_svg(figure).encode()


def as_svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element, the same text each time for the same data."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mlxq", "svg.fonttype": "none"}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    # Names stand in it as text, and XML has no place for what is cleaned away.
    text = clean(out.getvalue())
    return text[text.index("<svg") :]


def as_png(figure: Figure) -> bytes:
    """The figure as PNG, at twice the screen's resolution."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=200, bbox_inches="tight", facecolor="white")
    return out.getvalue()


def _colors(comparison: Comparison) -> list[str]:
    return [_COLORS[i % len(_COLORS)] for i in range(len(comparison.candidates))]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    # Not pyplot: it keeps figures, and picks a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes: Any = figure.subplots(1, columns)
    for axes in all_axes if columns > 1 else [all_axes]:
        _bare(axes)
    return figure, all_axes


def _name(text: str) -> str:
    """A name as matplotlib draws it as it is: what stands between dollars it would set as a formula."""
    return clean_line(text).replace("$", r"\$")


def _label(axes: Axes, x: str, y: str) -> None:
    """Name both axes, and what is drawn where anything has a name."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
