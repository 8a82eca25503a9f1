"""``mlxq compare ORIGINAL A B C``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlxq.cli.options import Json, Quiet, TrustRemoteCode
from mlxq.show.console import console
from mlxq.show.watch import watching

if TYPE_CHECKING:
    from mlxq.api import Event
    from mlxq.comparison.measure import Comparison
    from mlxq.errors import MlxqError
    from mlxq.planning.plan import Plan
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
        int | None,
        typer.Option("--tokens", min=512, max=10_000_000, help="Most tokens to compare on.", show_default=False),
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
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what quantizing cost.

    Size, speed and memory of each model, and how far it is from the original. A recipe is applied in memory.

    Example: mlxq compare ./original ./original-4bit mixed_4_6 --gate 'kl_mean<0.05' --html report.html
    """
    from mlxq.errors import BadInputError
    from mlxq.files import check_writable
    from mlxq.machine.backend import start_mlx
    from mlxq.recipe.gates import parse_gate

    console.use(quiet=quiet, as_json=as_json)
    gates = [parse_gate(line) for line in gate or ()]
    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise BadInputError(f"--plot {plot}: name a .svg or .png file")
    for picture in (html, plot):
        if picture is not None:
            check_writable(picture)
    rest = [m for m in models if m != reference] if reference else models[1:]
    if not rest:
        raise BadInputError("nothing to compare with the original", "Name models or recipes after it.")
    start_mlx()
    from mlxq import api
    from mlxq.comparison.measure import Settings, read_prompts
    from mlxq.running.speed import usual_settings

    settings = Settings(
        texts=tuple(text or ()),
        tokens=tokens,
        speed=usual_settings() if speed else None,
        prompts=read_prompts(prompts) if prompts else (),
    )
    with _kept() as kept, watching() as tell:
        api.compared(
            reference or models[0], rest, settings, trusted=trust_remote_code, on_event=lambda e: kept.add(e, tell)
        )
    results = api.gate_results(gates, kept.comparison)
    _show(kept.comparison, results, markdown=markdown, html=html, plot=plot)
    if kept.interrupted:
        raise KeyboardInterrupt
    api.require_gates(results)


class _Kept:
    """The newest comparison: what is finished when somebody presses Ctrl-C."""

    def __init__(self) -> None:
        self.newest: Comparison | None = None
        self.interrupted = False

    @property
    def comparison(self) -> Comparison:
        """Raises KeyboardInterrupt where nothing was finished."""
        if self.newest is None:
            raise KeyboardInterrupt
        return self.newest

    def add(self, event: Event, tell: Callable[[Event], None]) -> None:
        """Keep a comparison, and pass every event on."""
        from mlxq.comparison.measure import Comparison

        if isinstance(event, Comparison):
            self.newest = event
        tell(event)


@contextlib.contextmanager
def _kept() -> Iterator[_Kept]:
    """What a comparison came to; Ctrl-C ends it, is said, and keeps what is finished."""
    kept = _Kept()
    try:
        yield kept
    except KeyboardInterrupt:
        kept.interrupted = True
        console.warn("stopped; below is what was finished" if kept.newest else "stopped before anything was finished")


def check_gates_of(plan: Plan, out: Path) -> None:
    """Hold the model just made against its recipe's gates, with progress. Raises GateError where one fails."""
    from mlxq import api

    with watching() as tell:
        results = api.check_recipe_gates(plan, out, on_event=tell)
    for result in results:
        console.note(f"gate {'passed' if result.passed else 'failed'}: {result}")
    api.require_gates(results, out)


def _show(
    comparison: Comparison,
    gates: Sequence[GateResult],
    *,
    markdown: bool,
    html: Path | None,
    plot: Path | None,
) -> None:
    from mlxq.cli.keeping import kept_elsewhere, write_or_keep
    from mlxq.comparison import charts
    from mlxq.comparison.report import comparison_facts, comparison_html, comparison_markdown
    from mlxq.errors import MlxqError
    from mlxq.writing import pictures

    unwritten: list[MlxqError] = []
    pages: list[tuple[Path, Callable[[], bytes]]] = []
    if html is not None:
        pages.append((html, lambda: comparison_html(comparison, gates).encode()))
    if plot is not None:
        pages.append((plot, lambda: pictures.drawn(charts.size_against_kl(comparison), plot.suffix)))
    for file, content in pages:
        try:
            write_or_keep(file, content())
            console.note(f"wrote {file}")
        except MlxqError as error:
            unwritten.append(error)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write(comparison_markdown(comparison, gates) + "\n")
        except OSError as exc:
            console.warn(f"the summary of the job does not have the comparison: {exc.strerror}")
    try:
        _print(comparison, gates, markdown=markdown)
    except BrokenPipeError:
        raise
    except OSError as exc:
        facts = json.dumps(comparison_facts(comparison, gates), indent=2).encode()
        unwritten.append(kept_elsewhere(f"cannot write stdout: {exc.strerror}", "comparison.json", facts))
    if unwritten:
        hints = " ".join(error.hint for error in unwritten if error.hint)
        raise MlxqError("\n".join(error.message for error in unwritten), hints)


def _print(comparison: Comparison, gates: Sequence[GateResult], *, markdown: bool) -> None:
    from mlxq.comparison.measure import verdict
    from mlxq.comparison.report import comparison_facts, comparison_markdown, footnotes
    from mlxq.show import comparison_tables

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
    sys.stdout.flush()
