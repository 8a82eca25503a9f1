"""What ``convert`` and ``quantize`` share: show the plan, or run it and show what came out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.cli.fetching import fetched, say_waiting
from mlxq.show.console import interrupts, note, progress, show, show_json, show_text, warn

if TYPE_CHECKING:
    from mlxq.pipeline import Finished, Options
    from mlxq.planning.plan import Plan


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
    _show_result(plan, finished, seconds, generate=generate, as_json=as_json, quiet=quiet)
    return finished


def _show_result(plan: Plan, finished: Finished, seconds: float, *, generate: bool, as_json: bool, quiet: bool) -> None:
    from mlxq.machine.runtime import free_memory_bytes
    from mlxq.metrics.generation import generate_once
    from mlxq.show import tables
    from mlxq.writing.report import write_report

    answer = None
    if generate and finished.report["metrics"]["size_bytes"] * 1.5 > free_memory_bytes():
        note(
            "The model is too large for this machine's free memory, so it was not asked anything.",
            quiet=quiet,
        )
    elif generate:
        note("Asking the new model a question ...", quiet=quiet)
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
    if as_json:
        show_json({"output": str(finished.out), **finished.report})
        return
    show(tables.result_table(plan, finished, answer, seconds))
    show("Try it:")
    show_text(f'  mlx_lm.generate --model {shlex.quote(str(finished.out))} --prompt "Why is the sky blue?"')
