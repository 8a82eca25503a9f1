"""A plan as tables: what is decided for each module, by whom, and what it weighs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mlxq.errors import BadInputError
from mlxq.fold import fold
from mlxq.methods.formats import Format
from mlxq.planning.plan import By
from mlxq.recipe.match import matching
from mlxq.show.tables import facts_table, plain_table, shape_text, size_text
from mlxq.sources.belongings import described
from mlxq.tensors import FLOAT_DTYPES

if TYPE_CHECKING:
    from mlxq.pipeline import Finished
    from mlxq.planning.plan import Plan
    from mlxq.running.question import Generation
    from mlxq.tensors import TensorSpec
    from mlxq.writing.disk_space import DiskUse


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
    rows = [(d.path, (d.shape, str(d.format or FLOAT_DTYPES[d.dtype]), d.decided_by, d.note)) for d in plan.decisions]
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


def disk_summary(use: DiskUse) -> list[str]:
    """What is fetched, and the disk that takes, in a line; none where everything is here."""
    if use.download_bytes == 0 and not use.low_disk:
        return []
    fetched = f"{size_text(use.download_bytes)} to fetch"
    if not use.low_disk:
        needed = size_text(use.source_bytes + use.output_bytes)
        return [f"{fetched}; free disk needed: {needed}, source and output."]
    needed = size_text(use.source_bytes + use.output_bytes)
    source = f"{size_text(use.source_bytes)} of source at once ({use.shard_count} files in all)"
    return [f"{fetched}; free disk needed: {needed}, which is {size_text(use.output_bytes)} of output and {source}."]


def disk_facts(use: DiskUse) -> dict[str, Any]:
    """The disk a run takes, as data."""
    return {
        "download_bytes": use.download_bytes,
        "source_bytes": use.source_bytes,
        "output_bytes": use.output_bytes,
        "low_disk": use.low_disk,
    }


def plan_notes(plan: Plan) -> list[str]:
    """What a person should know before the plan runs: deviations, folded by layer, and formats the source imposes."""
    notes = [(d.path, d.note) for d in plan.decisions if d.note]
    lines = [
        *plan.remarks,
        *described(plan.source.left_behind),
        *(f"{folded.path}: {folded.attributes}" for folded in fold(notes)),
    ]
    kept = Counter(str(d.format) for d in plan.decisions if d.by is By.SOURCE)
    if kept and (plan.recipe.default or plan.recipe.rules):
        formats = ", ".join(f"{count} in {fmt}" for fmt, count in kept.items())
        lines.append(
            f"{sum(kept.values())} modules stay as the source has them quantized ({formats}); --requantize opens them"
        )
    return lines


def why_table(plan: Plan, pattern: str) -> Table:
    """For each module ``pattern`` matches: what decided, what else matched, and what the model asked for."""
    meant = matching(pattern, [d.path for d in plan.decisions], "--why")
    chosen = [d for d in plan.decisions if d.path in meant]
    if not chosen and pattern == "lm_head":
        chosen = [d for d in plan.decisions if d.path == plan.architecture.tied_head]
    if not chosen:
        raise BadInputError(
            f"--why {pattern}: no module of {plan.source.name} matches", "mlxq inspect MODEL lists them."
        )
    rows = [(d.path, (str(d.format or FLOAT_DTYPES[d.dtype]), d.decided_by, d.also, d.asked, d.note)) for d in chosen]
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


def result_table(finished: Finished, answer: Generation | None, seconds: float) -> Table:
    """Before and after of a finished run. ``seconds`` is the whole wall time of writing and verifying."""
    report = finished.report
    metrics = report["metrics"]
    before, after = metrics["source_bytes"], metrics["size_bytes"]
    table = facts_table(escape(str(finished.out)))
    formats = Counter(str(Format.from_config(m["format"])) if m["format"] else "kept" for m in report["modules"])
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
        table.add_row("answered", escape(answer.text) or "[dim]nothing: it ended at once[/]")
    return table
