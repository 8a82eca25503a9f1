"""A model as tables: its facts, its modules, and where it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mlxq.errors import BadInputError
from mlxq.fold import fold
from mlxq.recipe.match import matching
from mlxq.show.tables import count_text, facts_table, plain_table, shape_text, size_text

if TYPE_CHECKING:
    from mlxq.api import Inspected
    from mlxq.architecture.inspection import InspectedModule, Inspection
    from mlxq.architecture.tokenizer import Encoding
    from mlxq.machine.devices import Device
    from mlxq.machine.memory import Fit
    from mlxq.sources.soundness import Unsound


def chosen_modules(found: Inspection, pattern: str | None) -> tuple[InspectedModule, ...]:
    """The modules ``pattern`` matches, or all. Raises BadInputError where it matches none."""
    if pattern is None:
        return found.modules
    meant = matching(pattern, [m.path for m in found.modules], "--match")
    chosen = tuple(m for m in found.modules if m.path in meant)
    if not chosen:
        raise BadInputError(
            f"--match {pattern}: no module of {found.name} matches", "Leave --match out to see them all."
        )
    return chosen


def inspection_table(found: Inspection) -> Table:
    """The facts of a model: what it is, how large, how stored."""
    table = facts_table(escape(found.name))
    table.add_row("architecture", f"{found.architecture} ({found.model_type}), {found.layer_count} layers")
    parameters = count_text(found.parameters)
    if found.active_parameters != found.parameters:
        routing = f"{found.experts_per_token} of {found.experts} experts"
        parameters += f", {count_text(found.active_parameters)} active per token ({routing})"
    table.add_row("parameters", parameters)
    if found.left_behind_parameters:
        table.add_row("left behind", f"{count_text(found.left_behind_parameters)} that mlx-lm does not use")
    dtypes = ", ".join(f"{dtype} {size_text(nbytes)}" for dtype, nbytes in found.dtypes.items())
    table.add_row("stored as", f"{size_text(found.stored_bytes)} {found.kind}: {dtypes}")
    quantized = [found.quantization.method, found.quantization.detail] if found.quantization else ["no"]
    table.add_row("quantized", escape(", ".join(filter(None, quantized))))
    table.add_row("embeddings", "tied to the head" if found.tied_embeddings else "separate from the head")
    table.add_row("context", f"{found.context_length:,} tokens" if found.context_length else "not stated")
    facts = found.tokenizer
    vocabulary = f"{facts.vocabulary:,} tokens" if facts.vocabulary else "unknown vocabulary"
    vocabulary += " by the config" if facts.vocabulary and not facts.counted else ""
    template = "with a chat template" if facts.chat_template else "no chat template"
    table.add_row("tokenizer", f"{facts.kind or 'unknown kind'}, {vocabulary}, {template}")
    return table


def module_table(modules: Sequence[InspectedModule], *, folded: bool) -> Table:
    """Modules with shape, stored form and parameters, folded by layer or one by one."""
    table = plain_table("module", "shape", "stored", "parameters", right=("parameters",))
    if folded:
        rows = [(m.path, (m.shape, m.stored_as, m.kept)) for m in modules]
        sizes = {m.path: m.parameters for m in modules}
        for group in fold(rows):
            shape, stored, kept = group.attributes
            total = sum(sizes[path] for path in group.members)
            table.add_row(
                escape(group.path),
                shape_text(shape),
                stored,
                count_text(total),
                style=None if kept else "dim",
            )
    else:
        for m in modules:
            table.add_row(
                escape(m.path),
                shape_text(m.shape),
                m.stored_as,
                count_text(m.parameters),
                style=None if m.kept else "dim",
            )
    return table


def fit_heading(device: Device, context: int) -> str:
    """What ``fit_table`` is about: the device, how much of its memory a model may use, and the context."""
    usable = f"{size_text(device.usable_bytes)} of {size_text(device.memory_bytes)} usable"
    return f"[bold]On {escape(device.label)}:[/] {usable}, {context:,} tokens of context"


def fit_table(fits: Sequence[tuple[str, Fit]], device: Device) -> Table:
    """What each shipped recipe would weigh, and whether it runs on ``device``."""
    # The ceiling follows from the memory bandwidth, which is not known of every device.
    numbers = ("weights", "memory needed", "tokens/s at most")
    columns = ("recipe", "weights", "memory needed", "fits", *(numbers[-1:] if device.bandwidth else ()))
    table = plain_table(*columns, right=numbers)
    for name, reckoned in fits:
        ceiling = [f"{reckoned.decode_tps_ceiling:,.0f}"] if reckoned.decode_tps_ceiling else []
        fits_text = "[green]yes[/]" if reckoned.fits else "[red]no[/]"
        table.add_row(name, size_text(reckoned.weight_bytes), size_text(reckoned.needed_bytes), fits_text, *ceiling)
    return table


def encoding_table(encoding: Encoding) -> Table:
    """How a text is encoded, and whether it decodes back."""
    table = facts_table()
    table.add_row("tokens", str(len(encoding.ids)))
    table.add_row("ids", " ".join(map(str, encoding.ids)))
    table.add_row("pieces", escape(" | ".join(encoding.pieces)))
    table.add_row(
        "decodes back", "[green]yes[/]" if encoding.round_trips else f"[red]no[/]: {escape(encoding.decoded)}"
    )
    return table


def inspection_facts(
    found: Inspected,
    modules: Sequence[InspectedModule],
    unsound: Sequence[Unsound] | None = None,
) -> dict[str, Any]:
    """The inspection as data, for ``--json``; ``unsound`` is None where the weights were not read."""
    facts = asdict(found.inspection)
    del facts["config"]
    facts["modules"] = [asdict(module) for module in modules]
    return {
        "schema": "mlxq.inspect",
        "schema_version": 1,
        **facts,
        "device": {**asdict(found.device), "usable_bytes": found.device.usable_bytes},
        "recipes": {name: asdict(reckoned) for name, reckoned in found.fits},
        "encoding": asdict(found.encoding) if found.encoding else None,
        "unsound": None if unsound is None else [asdict(tensor) for tensor in unsound],
    }
