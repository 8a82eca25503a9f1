"""What ``convert`` and ``quantize`` share: show the plan, or run it and show what came out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.console import note, progress, show, show_json, show_text, warn

if TYPE_CHECKING:
    from mlxq.pipeline import Finished, Options
    from mlxq.plan import Plan


def show_plan(plan: Plan, *, out: Path, why: str | None, as_json: bool, quiet: bool, low_disk: bool = False) -> None:
    """Print the plan: as JSON, as the reasons for the modules ``why`` matches, or as the whole table."""
    from mlxq import tables
    from mlxq.report import plan_facts

    if as_json:
        show_json({"schema": "mlxq.plan", "schema_version": 1, "output": str(out), **plan_facts(plan)})
    elif why is not None:
        show(tables.why_table(plan, why))
    else:
        show(tables.plan_table(plan))
        for line in tables.plan_summary(plan):
            show(line)
        if low_disk:
            from mlxq.pipeline import low_disk_bytes

            show(f"With --low-disk it needs {tables.size_text(low_disk_bytes(plan))} of free disk.")
        what = "written" if plan.recipe.budget else "read or written"
        note(f"Nothing was {what}. Run it without --dry-run to make the model.", quiet=quiet)


def write_model(
    plan: Plan, out: Path, options: Options, *, force: bool, low_disk: bool, generate: bool, as_json: bool, quiet: bool
) -> Finished:
    """Run a plan with progress, then show the result and the line that tries it."""
    from mlxq.execute import Progress
    from mlxq.pipeline import Finished, Resumed, run
    from mlxq.tables import plan_notes

    began = time.perf_counter()
    for line in plan_notes(plan):
        note(line, quiet=quiet)
    finished: Finished | None = None
    partial = out.with_name(out.name + ".partial")
    try:
        with progress(f"Writing {out.name}", quiet=quiet) as meter:
            for event in run(plan, out, options, force=force, low_disk=low_disk):
                if isinstance(event, Progress):
                    meter.update(event.written_bytes, event.total_bytes, event.finished)
                elif isinstance(event, Resumed) and event.discarded:
                    warn(f"{event.folder} held work on another plan; it was started afresh")
                elif isinstance(event, Resumed):
                    note(f"continuing {event.folder}: {event.step_count} tensors were finished", quiet=quiet)
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
    from mlxq import tables
    from mlxq.metrics.generation import generate_once
    from mlxq.report import write_report
    from mlxq.runtime import free_memory_bytes

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
