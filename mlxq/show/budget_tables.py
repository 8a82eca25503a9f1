"""How a budget was spent, as tables: the checks, the size-KL curve, and what each byte bought."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from mlxq.budget.spend import CurvePoint, Spending, next_bytes
from mlxq.methods.formats import Format
from mlxq.recipe.match import layer_index
from mlxq.show.tables import plain_table, size_text

# What ``--explain`` asks about more room, or a tenth of a model too small for that.
MORE_BYTES = 100_000_000


def spending_lines(spending: Spending) -> list[str]:
    """What the budget came to, one line each."""
    bpw = spending.weight_bytes * 8 / spending.parameter_count
    share = spending.weight_bytes / spending.budget_bytes
    lines = [
        f"budget {spending.budget}: [bold]{spending.weight_bytes:,} bytes[/] of weights ({bpw:.3f} bits per weight), "
        f"{share:.2%} of what it allows"
    ]
    if spending.text is None:
        lines.append("chosen by relative error of the weights alone: without text there is no KL to predict")
        return lines
    gap = spending.allocation.gap
    lines.append(
        f"predicted KL {spending.allocation.divergence:.4f} nats per token, "
        + ("proved the least by these scores" if gap < 5e-5 else f"at most {gap:.2%} above the least by these scores")
    )
    return lines


def checks_table(spending: Spending) -> Table:
    """The chosen assignment beside its rivals, measured on text held out from calibration."""
    table = plain_table(
        "assignment", "weights", "KL measured", title="Checked on held-out text", right=("weights", "KL measured")
    )
    for check in spending.checks:
        mark = "[green]>[/] " if check.chosen else "  "
        kl = f"{check.kl_mean:.4f} ± {check.kl_mean_se:.4f}"
        over = "" if check.fits else " [dim](over the budget)[/]"
        table.add_row(f"{mark}{escape(check.name)}{over}", size_text(check.weight_bytes), kl)
    return table


def curve_table(curve: Sequence[CurvePoint], *, predicted: bool) -> Table:
    """The best assignment at each size."""
    table = plain_table(
        "bits/weight",
        "weights",
        "KL predicted" if predicted else "relative error",
        "KL measured",
        title="The best at each size",
        right=("bits/weight", "weights", "KL predicted", "relative error", "KL measured"),
    )
    for point in curve:
        measured = "-"
        if point.measured_kl is not None and point.measured_kl_se is not None:
            measured = f"{point.measured_kl:.4f} ± {point.measured_kl_se:.4f}"
        table.add_row(
            f"{point.bits_per_weight:.2f}", size_text(point.weight_bytes), f"{point.predicted_kl:.4f}", measured
        )
    return table


def bits_table(spending: Spending) -> Table:
    """Formats by kind of module and layer: runs of layers that share one are joined."""
    table = plain_table("module", "layers and their formats", title="Where the bits went")
    kinds: dict[str, dict[int | None, Format | None]] = defaultdict(dict)
    for path, fmt in spending.allocation.formats.items():
        index = layer_index(path)
        parts = path.split(".")
        kind = ".".join(parts[parts.index(str(index)) + 1 :]) if index is not None else path
        kinds[kind][index] = fmt
    for kind, by_layer in kinds.items():
        table.add_row(escape(kind), ", ".join(_runs(by_layer)))
    return table


def _runs(by_layer: dict[int | None, Format | None]) -> list[str]:
    if list(by_layer) == [None]:
        return [str(by_layer[None] or "kept")]
    texts: list[str] = []
    layers = sorted((layer, fmt) for layer, fmt in by_layer.items() if layer is not None)
    start = 0
    for end in range(1, len(layers) + 1):
        if end == len(layers) or layers[end][1] != layers[start][1]:
            first, last = layers[start][0], layers[end - 1][0]
            span = f"{first}" if first == last else f"{first}-{last}"
            texts.append(f"{span}: {layers[start][1] or 'kept'}")
            start = end
    return texts


def bought_table(spending: Spending) -> Table:
    """For each kind of module: the bytes above its smallest option, and the divergence they took away."""
    table = plain_table(
        "module",
        "formats",
        "bytes",
        "spent above least",
        "KL taken away",
        "KL left",
        "per MB",
        title="What the bytes bought (predicted KL)",
        right=("bytes", "spent above least", "KL taken away", "KL left", "per MB"),
    )
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    for path, choices in spending.options.items():
        chosen = next(o for o in choices if o.fmt == spending.allocation.formats[path])
        least = min(choices, key=lambda option: option.nbytes)
        kind = path.rpartition(".")[2]
        sums = totals[kind]
        sums[0] += chosen.nbytes
        sums[1] += chosen.nbytes - least.nbytes
        sums[2] += least.divergence - chosen.divergence
        sums[3] += chosen.divergence
        formats[kind][str(chosen.fmt or "kept")] += 1
    for kind, (nbytes, spent, taken, left) in sorted(totals.items(), key=lambda item: -item[1][3]):
        per_mb = f"{taken / spent * 1e6:.4f}" if spent else "-"
        mix = ", ".join(f"{count} x {fmt}" for fmt, count in sorted(formats[kind].items()))
        table.add_row(kind, mix, f"{nbytes:,.0f}", f"{spent:,.0f}", f"{taken:.4f}", f"{left:.4f}", per_mb)
    return table


def next_line(spending: Spending) -> str:
    """What more room would buy."""
    more = min(MORE_BYTES, spending.weight_bytes // 10)
    better = next_bytes(spending, more).divergence
    now = spending.allocation.divergence
    share = f" ({better / now - 1:+.0%})" if now else ""
    what = "predicted KL" if spending.text else "the sum of relative errors"
    return f"The next {size_text(more)} would take {what} from {now:.4f} to {better:.4f}{share}."
