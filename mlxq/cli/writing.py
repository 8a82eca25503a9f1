"""What ``convert`` and ``quantize`` share: show the plan, or run it and show what came out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlxq.show.console import interrupts, note, progress, show, show_json, show_text, warn

if TYPE_CHECKING:
    from collections.abc import Generator

    from mlxq.metrics.generation import Generation
    from mlxq.pipeline import Finished, Options
    from mlxq.planning.plan import Plan
    from mlxq.retry import Waiting
    from mlxq.sources.download import Downloading

_T = TypeVar("_T")


def say_waiting(event: Waiting) -> None:
    """Say on stderr that the Hub lets one wait."""
    warn(f"{event.reason}; trying again in {event.seconds:.0f} s")


def fetched(plan: Plan, out: Path, options: Options, *, quiet: bool) -> Plan:
    """The same plan with its source here, fetched with progress where it is on the Hub."""
    from mlxq.pipeline import with_weights

    if plan.source.remote is None:
        return plan
    return _fetched(with_weights(plan, out, options), plan.source.name, quiet=quiet)


def bring_here(model: str, *, quiet: bool) -> None:
    """Fetch a model into the cache, with progress, where it is on the Hub."""
    from mlxq.sources.download import fetch
    from mlxq.sources.resolve import resolve

    source = resolve(model, on_wait=say_waiting)
    if source.remote is not None:
        _fetched(fetch(source), model, quiet=quiet)


def _fetched(events: Generator[Downloading | Waiting, None, _T], name: str, *, quiet: bool) -> _T:
    """Run a download to its end, with progress; returns what it returns."""
    from mlxq.retry import Waiting

    try:
        with progress(f"Fetching {name}", quiet=quiet) as meter:
            while True:
                try:
                    event = next(events)
                except StopIteration as stop:
                    found: _T = stop.value
                    return found
                if isinstance(event, Waiting):
                    say_waiting(event)
                else:
                    meter.update(event.done_bytes, event.total_bytes, event.file)
    except KeyboardInterrupt:
        warn("stopped; files that are complete stay in the cache, and the same command continues with the others")
        raise


def show_plan(
    plan: Plan,
    *,
    out: Path,
    why: str | None,
    as_json: bool,
    quiet: bool,
    low_disk: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Print the plan: as JSON, as the reasons for the modules ``why`` matches, or as the whole table."""
    from mlxq.show import tables
    from mlxq.writing.disk_space import room_needed
    from mlxq.writing.report import plan_facts

    room = room_needed(plan, out, low_disk=low_disk, trust_remote_code=trust_remote_code)
    if as_json:
        facts = {"output": str(out), **plan_facts(plan), "disk": tables.room_facts(room)}
        show_json({"schema": "mlxq.planning.plan", "schema_version": 1, **facts})
    elif why is not None:
        show(tables.why_table(plan, why))
    else:
        show(tables.plan_table(plan))
        for line in (*tables.plan_summary(plan), *tables.room_summary(room)):
            show(line)
        what = "written" if plan.recipe.budget else "read or written"
        note(f"Nothing was {what}. Run it without --dry-run to make the model.", quiet=quiet)


def write_model(
    plan: Plan,
    out: Path,
    options: Options,
    *,
    force: bool,
    generate: bool,
    as_json: bool,
    quiet: bool,
    low_disk: bool = False,
) -> Finished:
    """Run a plan with progress, then show the result and the line that tries it."""
    from mlxq.pipeline import Finished, Resumed, check_output, run
    from mlxq.retry import Waiting
    from mlxq.show.tables import plan_notes
    from mlxq.sources.download import Downloading
    from mlxq.writing.execute import Progress

    began = time.perf_counter()
    check_output(plan, out, force=force)
    for line in plan_notes(plan):
        note(line, quiet=quiet)
    if low_disk and plan.source.remote is None:
        note(f"{plan.source.name} is on this disk already, so --low-disk changes nothing", quiet=quiet)
    if not low_disk:
        plan = fetched(plan, out, options, quiet=quiet)
    finished: Finished | None = None
    written = 0
    partial = out.with_name(out.name + ".partial")
    try:
        with interrupts() as stop_if_pressed, progress(f"Writing {out.name}", quiet=quiet) as meter:
            for event in run(plan, out, options, force=force, low_disk=low_disk):
                stop_if_pressed()
                if isinstance(event, Progress):
                    written = event.written_bytes
                    meter.update(event.written_bytes, event.total_bytes, event.finished)
                elif isinstance(event, Resumed) and event.discarded:
                    warn(f"{event.folder} held work on another plan; it was started afresh")
                elif isinstance(event, Resumed):
                    note(f"continuing {event.folder}: {event.step_count} tensors were finished", quiet=quiet)
                elif isinstance(event, Waiting):
                    say_waiting(event)
                elif isinstance(event, Downloading):
                    meter.update(written, plan.weight_bytes, f"fetching {event.file or 'the small files'}")
                elif isinstance(event, Finished):
                    finished = event
    except KeyboardInterrupt:
        if partial.is_dir():
            warn(f"stopped; what is finished stays in {partial}, and the same command continues from there")
        else:
            warn(f"stopped; {out} is complete" if out.is_dir() else "stopped; nothing was written")
        raise
    assert finished is not None
    seconds = time.perf_counter() - began
    answer = _ask(finished, trusted=options.trust_remote_code, quiet=quiet) if generate else None
    _show_result(plan, finished, answer, seconds, as_json=as_json)
    return finished


def _ask(finished: Finished, *, trusted: bool, quiet: bool) -> Generation | None:
    """Ask the new model a question. A courtesy: what goes wrong is said in one line, and the run goes on."""
    from mlxq.metrics.generation import NotAsked, ask
    from mlxq.writing.report import write_report

    note("Asking the new model a question ...", quiet=quiet)
    try:
        answer = ask(finished.out, trusted=trusted)
    except KeyboardInterrupt:
        # Who stops the command may well want to stop what comes next, an upload above all.
        warn(f"stopped; {finished.out} is complete, and nothing more was done with it")
        raise
    if isinstance(answer, NotAsked):
        finished.report["not_asked"] = answer.reason
        if answer.failed:
            warn(f"the new model {answer.reason}")
        else:
            note(f"The new model {answer.reason}.", quiet=quiet)
    else:
        finished.report["generation"] = vars(answer)
    try:
        write_report(finished.report, finished.out)
    except OSError as exc:
        warn(f"mlxq.json does not say what became of the question: {exc.strerror}")
    return None if isinstance(answer, NotAsked) else answer


def _show_result(plan: Plan, finished: Finished, answer: Generation | None, seconds: float, *, as_json: bool) -> None:
    from mlxq.show import tables

    if as_json:
        show_json({"output": str(finished.out), **finished.report})
        return
    show(tables.result_table(plan, finished, answer, seconds))
    show("Try it:")
    show_text(f'  mlx_lm.generate --model {shlex.quote(str(finished.out))} --prompt "Why is the sky blue?"')
