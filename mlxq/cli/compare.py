"""``mlxq compare ORIGINAL A B C``."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxq.cli.options import Json, Quiet

if TYPE_CHECKING:
    from mlxq.comparison.measure import Candidate, Comparison, Settings
    from mlxq.recipe.gates import GateResult


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="The original, then models or recipes: folders, Hub ids, .gguf files, recipe files or names."
        ),
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", help="The original, where it is not the first.", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text file to compare on, or 'self': sampled from the original. Repeatable."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=512, help="Most tokens to compare on.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of prompts (lines, or chat messages as JSON lines) to answer."),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time each model in a process of its own.")] = True,
    gate: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Fail with exit code 3 unless this holds, such as 'kl_mean<0.05'. Repeatable."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table on stdout.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write one self-contained page.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write size against KL as .svg or .png.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what quantizing cost.

    Size, speed and memory of each model, and how far it is from the original. A recipe is applied in memory.

    Example: mlxq compare ./original ./original-4bit mixed_4_6 --gate 'kl_mean<0.05' --html report.html
    """
    from mlxq.errors import BadInputError, GateError
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.gates import check_gates, parse_gate
    from mlxq.show.console import console

    console.use(quiet=quiet, as_json=as_json)
    gates = [parse_gate(line) for line in gate or ()]
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise BadInputError(f"--plot {plot}: name a .svg or .png file")
    for picture in (html, plot):
        if picture is not None and not picture.absolute().parent.is_dir():
            raise BadInputError(f"{picture}: there is no folder {picture.parent}", "Make it first.")
    rest = [m for m in models if m != reference] if reference else models[1:]
    if not rest:
        raise BadInputError("nothing to compare with the original", "Name models or recipes after it.")
    start_mlx()
    from mlxq.cli.fetching import bring_here
    from mlxq.comparison.candidates import load_candidate, model_candidate, with_distinct_names
    from mlxq.comparison.measure import Settings, read_prompts
    from mlxq.machine.cores import on_cpu
    from mlxq.recipe.load import names_recipe
    from mlxq.running.speed import CPU_SETTINGS, SpeedSettings

    lengths = (CPU_SETTINGS if on_cpu() else SpeedSettings()) if speed else None
    settings = Settings(
        texts=tuple(text or ()), tokens=tokens, speed=lengths, prompts=read_prompts(prompts) if prompts else ()
    )
    for name in (reference or models[0], *rest):
        if not names_recipe(name):
            bring_here(name)
    with tempfile.TemporaryDirectory(prefix="mlxq-compare-") as scratch:
        original = model_candidate(reference or models[0], Path(scratch))
        candidates = [load_candidate(name, original, Path(scratch)) for name in rest]
        original, *candidates = with_distinct_names([original, *candidates], [reference or models[0], *rest])
        comparison, interrupted = _measure(original, candidates, settings)
    if comparison is None:
        raise KeyboardInterrupt
    results = check_gates(gates, {r.name: r.metrics() for r in comparison.candidates})
    _record(comparison, candidates)
    _show(comparison, results, markdown=markdown, html=html, plot=plot)
    if interrupted:
        raise KeyboardInterrupt
    if failed := [result for result in results if not result.passed]:
        raise GateError("\n".join(f"gate failed for {result}" for result in failed))


def _measure(
    original: Candidate, candidates: Sequence[Candidate], settings: Settings
) -> tuple[Comparison | None, bool]:
    """Run the comparison with progress; on Ctrl-C keep what is finished and say so."""
    from mlxq.comparison.measure import Comparison, compare
    from mlxq.show.console import console
    from mlxq.show.meters import stages

    done: Comparison | None = None
    interrupted = False
    with stages("Comparing") as meter:
        try:
            for event in compare(original, candidates, settings):
                if isinstance(event, Comparison):
                    done = event
                    newest = event.results[-1]
                    if newest.not_timed is not None:
                        console.warn(f"{newest.name}: speed not measured: {newest.not_timed}")
                else:
                    meter.update(f"{event.stage}: {event.model}", event.done, event.total, event.eta_s)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        console.warn("stopped; below is what was finished" if done else "stopped before anything was finished")
    return done, interrupted


def check_recipe_gates(gates: Sequence[str], model: str, out: Path) -> None:
    """Compare ``out`` with the model it was made from and hold it against a recipe's gates.

    The results go into its ``mlxq.json``. Raises GateError with a line per failed gate.
    """
    from mlxq.cli.fetching import bring_here
    from mlxq.comparison.candidates import model_candidate
    from mlxq.comparison.measure import Settings
    from mlxq.errors import GateError
    from mlxq.machine.cores import on_cpu
    from mlxq.recipe.gates import check_gates, parse_gate
    from mlxq.running.speed import CPU_SETTINGS, SPEED_METRICS, SpeedSettings
    from mlxq.show.console import console

    parsed = [parse_gate(line) for line in gates]
    timed = any(gate.metric in SPEED_METRICS for gate in parsed)
    lengths = (CPU_SETTINGS if on_cpu() else SpeedSettings()) if timed else None
    bring_here(model)
    with tempfile.TemporaryDirectory(prefix="mlxq-compare-") as scratch:
        original = model_candidate(model, Path(scratch))
        candidate = model_candidate(str(out), Path(scratch))
        comparison, _ = _measure(original, [candidate], Settings(speed=lengths))
    if comparison is None or not comparison.complete:
        raise KeyboardInterrupt
    _record(comparison, [candidate])
    results = check_gates(parsed, {r.name: r.metrics() for r in comparison.candidates})
    for result in results:
        console.note(f"gate {'passed' if result.passed else 'failed'}: {result}")
    if failed := [result for result in results if not result.passed]:
        raise GateError("\n".join(f"gate failed for {result}" for result in failed), f"The model is in {out}.")


def _record(comparison: Comparison, candidates: Sequence[Candidate]) -> None:
    """Put each stored candidate's results into its ``mlxq.json``."""
    from mlxq.comparison.report import candidate_facts
    from mlxq.writing.report import FILE_NAME, read_report, write_report

    for result, candidate in zip(comparison.candidates, candidates, strict=False):
        if candidate.folder is None or not (candidate.folder / FILE_NAME).is_file():
            continue
        report = read_report(candidate.folder / FILE_NAME)
        report["comparison"] = candidate_facts(result, comparison)
        # A read-only folder (the Hub's cache, say) is measured all the same.
        with contextlib.suppress(PermissionError):
            write_report(report, candidate.folder)


def _show(
    comparison: Comparison,
    gates: Sequence[GateResult],
    *,
    markdown: bool,
    html: Path | None,
    plot: Path | None,
) -> None:
    from mlxq.comparison import charts
    from mlxq.comparison.measure import verdict
    from mlxq.comparison.report import comparison_facts, comparison_html, comparison_markdown, footnotes
    from mlxq.show import comparison_tables
    from mlxq.show.console import console

    if html is not None:
        html.write_text(comparison_html(comparison, gates), encoding="utf-8")
        console.note(f"wrote {html}")
    if plot is not None:
        charts.save_figure(charts.size_against_kl(comparison), plot)
        console.note(f"wrote {plot}")
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(comparison_markdown(comparison, gates) + "\n")
    if console.as_json:
        console.json(comparison_facts(comparison, gates))
    elif markdown:
        console.text(comparison_markdown(comparison, gates))
    else:
        for table in comparison_tables.comparison_tables(comparison):
            console.show(table)
        for table in comparison_tables.answer_tables(comparison):
            console.show(table)
        for result in comparison.candidates:
            console.text(verdict(result, comparison.reference) + ".")
        for line in footnotes(comparison):
            console.note(line)
