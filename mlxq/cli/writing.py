"""What ``convert`` and ``quantize`` share: show the plan, or run it and show what came out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlxq.cli.interrupts import interrupts
from mlxq.show.console import console
from mlxq.show.meters import progress

if TYPE_CHECKING:
    from collections.abc import Generator

    from mlxq.pipeline import Finished, Options
    from mlxq.planning.plan import Plan
    from mlxq.retry import Waiting
    from mlxq.sources.download import Downloading

_T = TypeVar("_T")


def say_waiting(event: Waiting) -> None:
    """Say on stderr that the Hub lets one wait."""
    console.warn(f"{event.reason}; trying again in {event.seconds:.0f} s")


def fetched(plan: Plan, out: Path, options: Options) -> Plan:
    """The same plan with its source here, fetched with progress where it is on the Hub."""
    from mlxq.pipeline import with_weights

    if plan.source.remote is None:
        return plan
    return _fetched(with_weights(plan, out, options), plan.source.name)


def bring_here(model: str) -> None:
    """Fetch a model into the cache, with progress, where it is on the Hub."""
    from mlxq.sources.download import fetch
    from mlxq.sources.resolve import resolve

    source = resolve(model, on_wait=say_waiting)
    if source.remote is not None:
        _fetched(fetch(source), model)


def _fetched(events: Generator[Downloading | Waiting, None, _T], name: str) -> _T:
    """Run a download to its end, with progress; returns what it returns."""
    from mlxq.retry import Waiting

    try:
        with progress(f"Fetching {name}") as meter:
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
        console.warn(
            "stopped; files that are complete stay in the cache, and the same command continues with the others"
        )
        raise


def show_plan(
    plan: Plan,
    *,
    out: Path,
    why: str | None,
    low_disk: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Print the plan: as JSON, as the reasons for the modules ``why`` matches, or as the whole table."""
    from mlxq.show import plan_tables
    from mlxq.writing.disk_space import room_needed
    from mlxq.writing.report import plan_facts

    room = room_needed(plan, out, low_disk=low_disk, trust_remote_code=trust_remote_code)
    if console.as_json:
        facts = {"output": str(out), **plan_facts(plan), "disk": plan_tables.room_facts(room)}
        console.json({"schema": "mlxq.plan", "schema_version": 1, **facts})
    elif why is not None:
        console.show(plan_tables.why_table(plan, why))
    else:
        console.show(plan_tables.plan_table(plan))
        for line in (*plan_tables.plan_summary(plan), *plan_tables.room_summary(room)):
            console.show(line)
        what = "written" if plan.recipe.budget else "read or written"
        console.note(f"Nothing was {what}. Run it without --dry-run to make the model.")


def write_model(
    plan: Plan,
    out: Path,
    options: Options,
    *,
    force: bool,
    generate: bool,
    low_disk: bool = False,
) -> Finished:
    """Run a plan with progress, then show the result and the line that tries it."""
    from mlxq.pipeline import Finished, Resumed, check_output, run
    from mlxq.retry import Waiting
    from mlxq.show.plan_tables import plan_notes
    from mlxq.sources.download import Downloading
    from mlxq.writing.execute import Progress

    began = time.perf_counter()
    check_output(plan, out, force=force)
    for line in plan_notes(plan):
        console.note(line)
    if low_disk and plan.source.remote is None:
        console.note(f"{plan.source.name} is on this disk already, so --low-disk changes nothing")
    if not low_disk:
        plan = fetched(plan, out, options)
    finished: Finished | None = None
    written = 0
    partial = out.with_name(out.name + ".partial")
    try:
        with interrupts() as stop_if_pressed, progress(f"Writing {out.name}") as meter:
            for event in run(plan, out, options, force=force, low_disk=low_disk):
                stop_if_pressed()
                if isinstance(event, Progress):
                    written = event.written_bytes
                    meter.update(event.written_bytes, event.total_bytes, event.finished)
                elif isinstance(event, Resumed) and event.discarded:
                    console.warn(f"{event.folder} held work on another plan; it was started afresh")
                elif isinstance(event, Resumed):
                    console.note(f"continuing {event.folder}: {event.step_count} tensors were finished")
                elif isinstance(event, Waiting):
                    say_waiting(event)
                elif isinstance(event, Downloading):
                    meter.update(written, plan.weight_bytes, f"fetching {event.file or 'the small files'}")
                elif isinstance(event, Finished):
                    finished = event
    except KeyboardInterrupt:
        if partial.is_dir():
            console.warn(f"stopped; what is finished stays in {partial}, and the same command continues from there")
        else:
            console.warn(f"stopped; {out} is complete" if out.is_dir() else "stopped; nothing was written")
        raise
    assert finished is not None
    seconds = time.perf_counter() - began
    _show_result(plan, finished, seconds, generate=generate)
    return finished


def _show_result(plan: Plan, finished: Finished, seconds: float, *, generate: bool) -> None:
    from mlxq.machine.runtime import free_memory_bytes
    from mlxq.metrics.generation import generate_once
    from mlxq.show import plan_tables
    from mlxq.writing.report import write_report

    answer = None
    if generate and finished.report["metrics"]["size_bytes"] * 1.5 > free_memory_bytes():
        console.note("The model is too large for this machine's free memory, so it was not asked anything.")
    elif generate:
        console.note("Asking the new model a question ...")
        answer = generate_once(finished.out)
        finished.report["generation"] = {
            "prompt": answer.prompt,
            "text": answer.text,
            "prompt_tps": answer.prompt_tps,
            "generation_tps": answer.generation_tps,
            "load_s": answer.load_s,
            "device": answer.device,
        }
        write_report(finished.report, finished.out)
    if console.as_json:
        console.json({"output": str(finished.out), **finished.report})
        return
    console.show(plan_tables.result_table(plan, finished, answer, seconds))
    console.show("Try it:")
    console.text(f'  mlx_lm.generate --model {shlex.quote(str(finished.out))} --prompt "Why is the sky blue?"')
