"""Every table a person sees, drawn from frozen data. 120 columns are enough for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from mlxq.errors import BadInputError
from mlxq.fold import fold
from mlxq.planning.plan import KEPT_AS_STORED
from mlxq.recipe.match import matches
from mlxq.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    from mlxq.architecture.inspection import InspectedModule, Inspection
    from mlxq.architecture.tokenizer import Encoding
    from mlxq.comparison.measure import Comparison
    from mlxq.machine.devices import Device
    from mlxq.machine.memory import Fit
    from mlxq.machine.runtime import Environment
    from mlxq.metrics.generation import Generation
    from mlxq.pipeline import Finished
    from mlxq.planning.plan import Plan
    from mlxq.publish.publish import Outlook
    from mlxq.recipe.load import Recipe
    from mlxq.recipe.target import Target
    from mlxq.tensors import TensorSpec
    from mlxq.writing.disk_space import Room


def size_text(nbytes: float) -> str:
    """Bytes in the decimal units disks and the Hub use: ``2.21 GB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}" if unit == "GB" else f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes:,.0f} B"


def shape_text(shape: Sequence[int]) -> str:
    """``(3072, 8192)`` as ``3072x8192``."""
    return "x".join(map(str, shape)) or "scalar"


def count_text(count: float) -> str:
    """A parameter count as people say it: ``134.5M``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f}{unit}" if unit == "B" else f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


def plain_table(*headers: str, title: str | None = None, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def plan_table(plan: Plan) -> Table:
    """The whole plan, folded by layer: every module's shape, format, who decided, and its bytes."""
    table = plain_table(
        "module",
        "shape",
        "format",
        "decided by",
        "bytes",
        title=f"Plan for {plan.source.name}",
        right=("bytes",),
    )
    nbytes = {d.path: d.nbytes for d in plan.decisions}
    rows = [(d.path, (d.shape, str(d.format or FLOAT_DTYPES[d.dtype]), d.by, d.note)) for d in plan.decisions]
    for folded in fold(rows):
        shape, fmt, by, note = folded.attributes
        total = sum(nbytes[path] for path in folded.members)
        mark = " [yellow]*[/]" if note else ""
        table.add_row(escape(folded.path), shape_text(shape), fmt + mark, escape(by), f"{total:,}")
    decided = {d.path for d in plan.decisions}
    rest: list[TensorSpec] = [
        spec for step in plan.steps for spec in step.outputs if spec.name.rpartition(".")[0] not in decided
    ]
    biases = plan.weight_bytes - sum(nbytes.values()) - sum(spec.nbytes for spec in rest)
    other = sum(spec.nbytes for spec in rest) + biases
    table.add_row(f"[dim]everything else ({len(rest)} tensors)[/]", "", "", "[dim]not quantizable[/]", f"{other:,}")
    return table


def plan_summary(plan: Plan) -> list[str]:
    """Totals to the byte, and each module that had to deviate, one line each."""
    lines = [
        f"[bold]{plan.file_bytes:,} bytes[/] in {len(plan.shards)} weight file{'s' * (len(plan.shards) > 1)} "
        f"({size_text(plan.file_bytes)}), {plan.bits_per_weight:.3f} bits per weight; "
        f"the source has {size_text(plan.source.stored_bytes)}."
    ]
    return lines + [f"[yellow]*[/] {escape(line)}" for line in plan_notes(plan)]


def room_summary(room: Room) -> list[str]:
    """What is fetched, and the disk that takes, in a line; none where everything is here."""
    if room.download_bytes == 0 and not room.low_disk:
        return []
    fetched = f"{size_text(room.download_bytes)} to fetch"
    if not room.low_disk:
        needed = size_text(room.source_bytes + room.output_bytes)
        return [f"{fetched}; free disk needed: {needed}, source and output."]
    needed = size_text(room.source_bytes + room.output_bytes)
    source = f"{size_text(room.source_bytes)} of source at once ({room.shard_count} files in all)"
    return [f"{fetched}; free disk needed: {needed}, which is {size_text(room.output_bytes)} of output and {source}."]


def room_facts(room: Room) -> dict[str, Any]:
    """The disk a run takes, as data."""
    return {
        "download_bytes": room.download_bytes,
        "source_bytes": room.source_bytes,
        "output_bytes": room.output_bytes,
        "low_disk": room.low_disk,
    }


def plan_notes(plan: Plan) -> list[str]:
    """What a person should know before the plan runs: deviations, folded by layer, and formats the source imposes."""
    notes = [(d.path, d.note) for d in plan.decisions if d.note]
    lines = [*plan.remarks, *(f"{folded.path}: {folded.attributes}" for folded in fold(notes))]
    kept = Counter(str(d.format) for d in plan.decisions if d.by == KEPT_AS_STORED)
    if kept and (plan.recipe.default or plan.recipe.rules):
        formats = ", ".join(f"{count} in {fmt}" for fmt, count in kept.items())
        lines.append(
            f"{sum(kept.values())} modules stay as the source has them quantized ({formats}); --requantize opens them"
        )
    return lines


def why_table(plan: Plan, pattern: str) -> Table:
    """For each module ``pattern`` matches: what decided, what else matched, and what the model asked for."""
    chosen = [d for d in plan.decisions if matches(pattern, d.path)]
    if not chosen and pattern == "lm_head":
        chosen = [d for d in plan.decisions if d.path == plan.architecture.tied_head]
    if not chosen:
        raise BadInputError(
            f"--why {pattern}: no module of {plan.source.name} matches", "mlxq inspect MODEL lists them."
        )
    rows = [(d.path, (str(d.format or FLOAT_DTYPES[d.dtype]), d.by, d.also, d.asked, d.note)) for d in chosen]
    lines = []
    for folded in fold(rows):
        fmt, by, also, asked, note = folded.attributes
        lines.append((folded.path, fmt, by, ", ".join(also), asked or "", note or ""))
    headers = ("module", "format", "decided by", "rules that matched too", "the model asks for", "note")
    # A column that says nothing of any module only takes room from the paths.
    told = [i for i, header in enumerate(headers) if i < 3 or any(line[i] for line in lines)]
    table = plain_table(*(headers[i] for i in told))
    for line in lines:
        table.add_row(*(escape(line[i] or "-") for i in told))
    return table


def result_table(plan: Plan, finished: Finished, answer: Generation | None, seconds: float) -> Table:
    """Before and after of a finished run. ``seconds`` is the whole wall time of writing and verifying."""
    metrics = finished.report["metrics"]
    before, after = plan.source.stored_bytes, metrics["size_bytes"]
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title=str(finished.out), title_justify="left")
    table.title_style = "bold"
    formats = Counter(str(d.format) if d.format else "kept" for d in plan.decisions)
    table.add_row("size", f"{size_text(before)} -> [bold]{size_text(after)}[/]  ({after:,} bytes)")
    table.add_row("bits per weight", f"{metrics['bits_per_weight']:.3f}, counted from the files")
    table.add_row("modules", ", ".join(f"{count} x {fmt}" for fmt, count in formats.most_common()))
    table.add_row("time", f"{seconds:.1f} s")
    table.add_row("peak memory", f"{size_text(metrics['peak_memory_bytes'])} while writing")
    if answer is not None:
        table.add_row(
            "speed",
            f"{answer.generation_tps:.1f} tokens/s generated, {answer.prompt_tps:.1f} tokens/s of prompt, "
            f"on the {answer.device}",
        )
        table.add_row("asked", escape(answer.prompt))
        table.add_row("answered", escape(answer.text))
    return table


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """The shipped recipes and when to use each."""
    table = plain_table("name", "what it does")
    for recipe in recipes:
        table.add_row(f"[bold]{recipe.name}[/]", escape(recipe.description))
    return table


def environment_table(found: Environment) -> Table:
    """What this machine is."""
    from mlxq.machine.runtime import BlasInfo

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for field in fields(found):
        value = getattr(found, field.name)
        name = field.name.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, dict):
            for key, version in value.items():
                table.add_row(key, escape(str(version)))
        elif field.name.endswith("_bytes"):
            table.add_row(name, size_text(value) if value is not None else "unknown")
        elif isinstance(value, BlasInfo):
            table.add_row(name, f"{value.name}: {escape(value.note)}")
        elif isinstance(value, bool):
            table.add_row(name, "yes" if value else "no")
        else:
            table.add_row(name, escape(str(value)))
    return table


def chosen_modules(found: Inspection, pattern: str | None) -> tuple[InspectedModule, ...]:
    """The modules ``pattern`` matches, or all. Raises BadInputError where it matches none."""
    if pattern is None:
        return found.modules
    chosen = tuple(m for m in found.modules if matches(pattern, m.path))
    if not chosen:
        raise BadInputError(
            f"--match {pattern}: no module of {found.name} matches", "Leave --match out to see them all."
        )
    return chosen


def inspection_table(found: Inspection) -> Table:
    """The facts of a model: what it is, how large, how stored."""
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False, title=escape(found.name), title_justify="left")
    table.title_style = "bold"
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
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_row("tokens", str(len(encoding.ids)))
    table.add_row("ids", " ".join(map(str, encoding.ids)))
    table.add_row("pieces", escape(" | ".join(encoding.pieces)))
    table.add_row(
        "decodes back", "[green]yes[/]" if encoding.round_trips else f"[red]no[/]: {escape(encoding.decoded)}"
    )
    return table


def inspection_facts(
    found: Inspection,
    modules: Sequence[InspectedModule],
    device: Device,
    fits: Sequence[tuple[str, Fit]],
    encoding: Encoding | None,
) -> dict[str, Any]:
    """The inspection as data, for ``--json``."""
    facts = asdict(found)
    del facts["config"]
    facts["modules"] = [asdict(module) for module in modules]
    return {
        "schema": "mlxq.inspect",
        "schema_version": 1,
        **facts,
        "device": {**asdict(device), "usable_bytes": device.usable_bytes},
        "recipes": {name: asdict(reckoned) for name, reckoned in fits},
        "encoding": asdict(encoding) if encoding else None,
    }


# A comparison has more columns than 120 characters hold: one table for what a model costs, one for how far it is.
_COST_COLUMNS = ("size_bytes", "bits_per_weight", "generation_tps", "prompt_tps", "peak_memory_bytes", "load_s")
_FAITHFULNESS_COLUMNS = ("kl_mean", "kl_median", "kl_p99", "top1_agreement", "ppl", "ppl_ratio")


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Size, speed and memory; then the distance from the reference. Best values are marked with a star."""
    return [
        _comparison_table(comparison, _COST_COLUMNS, "Cost"),
        _comparison_table(comparison, _FAITHFULNESS_COLUMNS, f"Distance from {comparison.reference.name}"),
    ]


def _comparison_table(comparison: Comparison, columns: Sequence[str], title: str) -> Table:
    from mlxq.comparison.report import best_names, cell_text
    from mlxq.metrics.names import METRICS

    shown = [c for c in columns if any(r.metrics().get(c) is not None for r in comparison.results)]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in shown:
        table.add_column(METRICS[name].label, justify="right")
    for result in comparison.results:
        cells = []
        for name in shown:
            best = result.name in best_names(comparison, name)
            cells.append(f"[bold green]*{cell_text(result, name)}[/]" if best else cell_text(result, name))
        mark = " (reference)" if result is comparison.reference else " (tied)" if result.tied else ""
        table.add_row(escape(result.name) + mark, *cells)
    return table


def answer_tables(comparison: Comparison) -> list[Table]:
    """One table per prompt: every model's answer, with its speed and peak memory."""
    timed = [(result.name, result.speed.answers) for result in comparison.results if result.speed]
    tables = []
    for index in range(max((len(answers) for _, answers in timed), default=0)):
        table = plain_table("model", "answer", "tokens/s", "memory", right=("tokens/s", "memory"))
        table.title = escape(timed[0][1][index].prompt)
        for name, answers in timed:
            answer = answers[index]
            memory = size_text(answer.peak_memory_bytes)
            table.add_row(escape(name), escape(answer.text), f"{answer.generation_tps:.1f}", memory)
        tables.append(table)
    return tables


def upload_table(outlook: Outlook) -> Table:
    """The files as an upload would leave them on the Hub."""
    table = plain_table("file", "size", "on the Hub", right=("size",))
    for change in outlook.changes:
        style = "dim" if change.change == "unchanged" else ""
        table.add_row(escape(change.name), size_text(change.size_bytes), change.change, style=style)
    return table


def upload_summary(target: Target, outlook: Outlook) -> str:
    """One line: how much would be sent, and where it would go."""
    sent, removed = outlook.named("new", "changed"), outlook.named("removed")
    if not sent and not removed:
        return f"Nothing changed: {target.repo} holds all of it."
    where = f"{target.repo} (new)" if not outlook.remote.exists else target.repo
    if target.create_pr:
        where = f"a pull request on {where}"
    elif target.branch != "main":
        where += f", branch {target.branch}" + ("" if outlook.remote.branch_exists else " (new)")
    size = size_text(sum(change.size_bytes for change in sent))
    return f"{len(sent)} files, {size}, to {where}" + (f"; {len(removed)} removed." if removed else ".")
