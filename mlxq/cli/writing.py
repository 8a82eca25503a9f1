"""What ``convert`` and ``quantize`` share: show the plan, or run it and show what came out."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.cli.fetching import brought_for
from mlxq.show.console import console
from mlxq.show.watch import watching

if TYPE_CHECKING:
    from mlxq.pipeline import Finished
    from mlxq.planning.plan import Plan
    from mlxq.running.question import Generation


def show_plan(plan: Plan, *, out: Path, why: str | None, low_disk: bool = False) -> None:
    """Print the plan: as JSON, as the reasons for the modules ``why`` matches, or as the whole table."""
    from mlxq.show import plan_tables
    from mlxq.writing.disk_space import disk_use
    from mlxq.writing.report import plan_facts

    use = disk_use(plan, out, low_disk=low_disk)
    if console.as_json:
        facts = {"output": str(out), **plan_facts(plan), "disk": plan_tables.disk_facts(use)}
        console.json({"schema": "mlxq.plan", "schema_version": 1, **facts})
    elif why is not None:
        console.show(plan_tables.why_table(plan, why))
    else:
        console.show(plan_tables.plan_table(plan))
        for line in (*plan_tables.plan_summary(plan), *plan_tables.disk_summary(use)):
            console.show(line)
        what = "written" if plan.recipe.budget else "read or written"
        console.note(f"Nothing was {what}. Run it without --dry-run to make the model.")


def write_model(plan: Plan, out: Path, *, force: bool, generate: bool, low_disk: bool = False) -> Finished:
    """Run a plan with progress, then show the result and the line that tries it."""
    from mlxq import api
    from mlxq.show.plan_tables import plan_notes
    from mlxq.writing.standing import check_output, partial_of

    began = time.perf_counter()
    check_output(plan.source, out, force=force)
    for line in plan_notes(plan):
        console.note(line)
    if low_disk and plan.source.remote is None:
        console.note(f"{plan.source.name} is on this disk already, so --low-disk changes nothing")
    if not low_disk:
        plan = brought_for(plan, out)
    partial = partial_of(out)
    try:
        with watching(f"Writing {out.name}") as tell:
            finished = api.write(plan, out, force=force, low_disk=low_disk, on_event=tell)
    except KeyboardInterrupt:
        if partial.is_dir():
            console.warn(f"stopped; what is finished stays in {partial}, and the same command continues from there")
        else:
            console.warn(f"stopped; {out} is complete" if out.is_dir() else "stopped; nothing was written")
        raise
    seconds = time.perf_counter() - began
    answer = _ask(finished, trusted=plan.source.trusted) if generate else None
    _show_result(finished, answer, seconds)
    return finished


def _ask(finished: Finished, *, trusted: bool) -> Generation | None:
    """Ask the new model a question. A courtesy: what goes wrong is said in one line, and the run goes on."""
    from mlxq.running.question import NotAsked, ask
    from mlxq.writing.report import write_report

    console.note("Asking the new model a question ...")
    try:
        answer = ask(finished.out, trusted=trusted)
    except KeyboardInterrupt:
        # Who stops the command may well want to stop what comes next, an upload above all.
        console.warn(f"stopped; {finished.out} is complete, and nothing more was done with it")
        raise
    if isinstance(answer, NotAsked):
        finished.report["not_asked"] = answer.reason
        if answer.failed:
            console.warn(f"the new model {answer.reason}")
        else:
            console.note(f"The new model {answer.reason}.")
    else:
        finished.report["generation"] = vars(answer)
    try:
        write_report(finished.report, finished.out)
    except OSError as exc:
        console.warn(f"mlxq.json does not say what became of the question: {exc.strerror}")
    return None if isinstance(answer, NotAsked) else answer


def _show_result(finished: Finished, answer: Generation | None, seconds: float) -> None:
    from mlxq.show import plan_tables

    if console.as_json:
        console.json({"output": str(finished.out), **finished.report})
        return
    console.show(plan_tables.result_table(finished, answer, seconds))
    console.show("Try it:")
    console.text(f'  mlx_lm.generate --model {shlex.quote(str(finished.out))} --prompt "Why is the sky blue?"')
