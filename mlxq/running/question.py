"""The question after a run: does the new model answer, and how fast on this machine?

A courtesy: asked in a process of its own, for a minute at most, and whatever goes wrong is a reason, not an error.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxq import upstream
from mlxq.errors import ChildError
from mlxq.machine.child import Limits, run_child
from mlxq.running.opened import Opened, child_limits, open_folder, prompt_tokens, speak, without_paths

PROMPT = "In one or two sentences: why is the sky blue?"
MAX_TOKENS = 48
# The most that the question may take, the start of its process and the loading included.
SECONDS = 60.0


@dataclass(frozen=True)
class Generation:
    """One answer: ``prompt_tps`` and ``generation_tps`` are tokens per second, ``device`` where it ran."""

    prompt: str
    text: str
    prompt_tps: float
    generation_tps: float
    load_s: float
    device: str


@dataclass(frozen=True)
class NotAsked:
    """Why there is no answer, as the end of a sentence about the model. ``failed``: it was tried."""

    reason: str
    failed: bool


def ask(folder: Path, *, trusted: bool = False, limits: Limits | None = None) -> Generation | NotAsked:
    """Ask the model in ``folder`` a question. Its own code is run only where it is ``trusted``.

    Never raises for what the model or its files do; ``limits`` are a minute and ``child_limits`` unless given.
    """
    limits = limits or child_limits(folder, SECONDS)
    request = {"folder": str(folder), "trusted": trusted, "until": time.monotonic() + limits.seconds}
    try:
        found = run_child(answer_question, request, limits)
    except ChildError as error:
        return NotAsked(f"could not be asked: {without_paths(error.message, folder)}", failed=True)
    if "left_out" in found:
        return NotAsked(f"was not asked: {found['left_out']}", failed=False)
    return Generation(**found)


def answer_question(request: dict[str, Any]) -> dict[str, Any]:
    """The child's part of ``ask``: a Generation, or ``left_out``. ``until`` is by this system's monotonic clock."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxq.machine.runtime import free_memory_bytes

    upstream.preload()
    began = time.perf_counter()
    opened = open_folder(Path(request["folder"]), trusted=request["trusted"])
    opening_s = time.perf_counter() - began
    # All that fails fast comes before the weights are read.
    tokens = prompt_tokens(opened, PROMPT)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if on_cpu:
        # The CPU backend has no 16-bit arithmetic and emulates it ten times slower. The packed weights stay.
        opened.model.set_dtype(mx.float32)
    weight_bytes = sum(array.nbytes for _, array in tree_flatten(opened.model.parameters()))
    if weight_bytes * 1.5 > free_memory_bytes():
        return {"left_out": "it is too large for this machine's free memory"}
    began = time.perf_counter()
    mx.eval(opened.model.parameters())
    load_s = opening_s + time.perf_counter() - began
    if too_slow := _too_slow(opened, tokens, request["until"]):
        return {"left_out": too_slow}
    if not on_cpu:
        # A GPU's kernels are compiled when first met, which can take longer than the whole answer.
        speak(opened, tokens, 2)
    spoken = speak(opened, tokens, MAX_TOKENS)
    device = "CPU, with fp32 activations" if on_cpu else "GPU"
    return asdict(Generation(PROMPT, spoken.text, spoken.prompt_tps, spoken.generation_tps, load_s, device))


def _too_slow(opened: Opened, tokens: list[int], until: float) -> str | None:
    """Why the answer would not be there in time, judged by one token, or None.

    A token of the prompt costs at most as much as one of the answer, which is made alone.
    """
    total = len(tokens) + MAX_TOKENS
    step_s = _step_s(opened, tokens[0])
    if step_s * total > until - time.monotonic():
        # The first also waited for what is done once: pages touched, kernels compiled.
        step_s = min(step_s, _step_s(opened, tokens[0]))
    answer_s = step_s * total
    if answer_s <= until - time.monotonic():
        return None
    return f"one token takes {_duration(step_s)} here, so the answer would take about {_duration(answer_s)}"


def _step_s(opened: Opened, token: int) -> float:
    """Seconds of one token on its own."""
    import mlx.core as mx

    began = time.perf_counter()
    mx.eval(opened.model(mx.array([[token]]), cache=upstream.prompt_cache(opened.model)))
    return time.perf_counter() - began


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
