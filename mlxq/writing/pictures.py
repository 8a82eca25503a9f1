"""Pictures of what ``mlxq.json`` holds, and what every picture is drawn with: matplotlib, as SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlxq.clean import clean, clean_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people who see red and green alike (Okabe & Ito), and two more.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5B4B8A")
GREY = "#7A7A7A"


def one_model(measured: Mapping[str, Any]) -> Figure:
    """What a model card shows of one comparison: bits of each layer, and the KL divergence of single tokens.

    ``measured`` is what ``mlxq.json`` keeps of a comparison.
    """
    figure, (left, right) = new_figure(9.6, 3.2, columns=2)
    layers = measured["layer_bits"]
    left.bar(range(len(layers)), list(layers.values()), color=COLORS[0], width=0.8)
    step = max(1, len(layers) // 12)
    left.set_xticks(
        range(0, len(layers), step), [plain(label) for label in layers][::step], rotation=45 if len(layers) > 6 else 0
    )
    left.set_xlabel("layer")
    left.set_ylabel("bits per weight")
    edges, counts = measured["kl_histogram"]["edges"], measured["kl_histogram"]["counts"]
    total = max(sum(counts), 1)
    above = [sum(counts[index + 1 :]) / total for index in range(len(edges))]
    shown = [(edge, share) for edge, share in zip(edges, above, strict=True) if share > 0]
    if shown:
        right.plot(*zip(*shown, strict=True), color=COLORS[1], linewidth=1.5)
        right.set_xscale("log")
        right.set_yscale("log")
    right.set_xlabel("KL divergence of a token, nats")
    right.set_ylabel("share of tokens above")
    return figure


def size_kl_curve(spent: Mapping[str, Any]) -> Figure:
    """The size-KL curve of a budget: predicted at every point, measured at some, with the chosen point and rivals.

    ``spent`` is ``Spending.facts()``, as ``mlxq.json`` holds it under ``budget``.
    """
    figure, axes = new_figure(7.6, 4.6)
    predicted = [(point["weight_bytes"] / 1e6, max(point["predicted_kl"], 1e-9)) for point in spent["curve"]]
    name = "predicted" if spent["text"] else "relative error of weights"
    axes.plot(*zip(*predicted, strict=True), color=COLORS[0], linewidth=1.5, marker=".", label=name)
    measured = [
        (point["weight_bytes"] / 1e6, point["measured_kl"], 2 * point["measured_kl_se"])
        for point in spent["curve"]
        if point["measured_kl"]
    ]
    if measured:
        sizes, values, errors = zip(*measured, strict=True)
        label = "measured on held-out text"
        axes.errorbar(sizes, values, yerr=errors, fmt="s", color=COLORS[1], capsize=2, label=label)
    for check in spent["checks"]:
        point = (check["weight_bytes"] / 1e6, max(check["kl_mean"], 1e-9))
        if check["chosen"]:
            axes.plot(*point, marker="*", markersize=13, color=COLORS[2], linestyle="", label="chosen, measured")
        elif check["name"].startswith(("uniform", "mixed")):
            axes.plot(*point, marker="o", color=GREY, linestyle="")
            axes.annotate(plain(check["name"]), point, xytext=(6, 5), textcoords="offset points", fontsize=8.5)
    axes.set_yscale("log")
    axes.set_xlabel("size of the weights, MB")
    axes.set_ylabel("mean KL divergence from the original, nats" if spent["text"] else "sum of relative errors")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def plain(text: str) -> str:
    """A name as matplotlib draws it as it is: what stands between dollars it would set as a formula."""
    return clean_line(text).replace("$", r"\$")


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


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of ``width`` by ``height`` inches and its axes, one or a row of them."""
    # Not pyplot: it keeps figures, and picks a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    all_axes: Any = figure.subplots(1, columns)
    for axes in all_axes if columns > 1 else [all_axes]:
        _bare(axes)
    return figure, all_axes


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Name both axes, and what is drawn where anything has a name."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5)
