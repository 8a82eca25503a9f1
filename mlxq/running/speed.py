"""Speed and memory of a model folder as ``mlx_lm`` runs it, each model timed in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxq import upstream
from mlxq.machine.child import Limits, run_child
from mlxq.running.opened import Opened, child_limits, open_folder, prompt_tokens, speak

# The most that timing a model may take before it is given up: for loading, warming up and the first trial, and for
# each answer. Meant for what hangs; the largest models that a machine holds load and answer well within them.
_FIRST_TRIAL_S = 600.0
_ANSWER_S = 300.0


@dataclass(frozen=True)
class SpeedSettings:
    """Fixed lengths in tokens, timed up to ``trials`` times after a warm-up.

    No trial is begun after ``budget_s`` seconds of them; the first always is.
    """

    prompt_tokens: int = 512
    generation_tokens: int = 64
    trials: int = 5
    budget_s: float = 60.0


SPEED_METRICS = (
    "load_s",
    "prompt_tps",
    "generation_tps",
    "load_peak_memory_bytes",
    "peak_memory_bytes",
    "active_memory_bytes",
)

# MLX's CPU backend multiplies quantized matrices about a hundred times slower than a Mac's GPU does.
CPU_SETTINGS = SpeedSettings(prompt_tokens=32, generation_tokens=8, trials=3, budget_s=30.0)


def usual_settings() -> SpeedSettings:
    """The lengths that suit this machine."""
    from mlxq.machine.cores import on_cpu

    return CPU_SETTINGS if on_cpu() else SpeedSettings()


@dataclass(frozen=True)
class Answer:
    """A greedy answer to a prompt; tokens/sec of its generation and the peak memory of making it."""

    prompt: str
    text: str
    generation_tps: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Speed:
    """Medians in tokens/sec; each ``_spread`` is half the range between the quartiles. Memory in bytes.

    ``load_s`` is ``mlx_lm.load``, all weights in memory and the tokenizer included. Memory is what MLX's
    allocator counted. ``trials`` is how many were timed. ``device`` is ``cpu`` or ``gpu``: a CPU's timing
    says little about a Mac's GPU.
    """

    load_s: float
    prompt_tps: float
    prompt_tps_spread: float
    generation_tps: float
    generation_tps_spread: float
    load_peak_memory_bytes: int
    peak_memory_bytes: int
    active_memory_bytes: int
    device: str
    settings: SpeedSettings
    trials: int
    answers: tuple[Answer, ...]

    def metrics(self) -> dict[str, float]:
        """The scalars by metric name."""
        return {name: getattr(self, name) for name in SPEED_METRICS}


def measure_speed(
    folder: Path,
    settings: SpeedSettings,
    prompts: Sequence[Any] = (),
    *,
    answer_tokens: int = 128,
    trusted: bool = False,
    limits: Limits | None = None,
) -> Speed:
    """Time ``folder`` in a new process. ``prompts`` are strings or lists of chat messages, answered greedily.
    The model's own code runs only where it is ``trusted``.

    Raises ChildError where the model or its tokenizer fails, or passes ``limits``.
    """
    if limits is None:
        limits = child_limits(folder, _FIRST_TRIAL_S + settings.budget_s + _ANSWER_S * len(prompts))
    request = {
        "folder": str(folder),
        "trusted": trusted,
        "settings": asdict(settings),
        "prompts": list(prompts),
        "answer_tokens": answer_tokens,
    }
    found = run_child(time_model, request, limits)
    found["settings"] = SpeedSettings(**found["settings"])
    found["answers"] = tuple(Answer(**answer) for answer in found["answers"])
    return Speed(**found)


def time_model(request: dict[str, Any]) -> dict[str, Any]:
    """The child's part of ``measure_speed``: load, warm up, time, and answer."""
    import mlx.core as mx

    settings = SpeedSettings(**request["settings"])
    upstream.preload()
    mx.reset_peak_memory()
    began = time.perf_counter()
    opened = open_folder(Path(request["folder"]), trusted=request["trusted"])
    opening_s = time.perf_counter() - began
    # A prompt that its template cannot lay out is found out before the weights are read.
    asked = [(_last_words(prompt), prompt_tokens(opened, prompt)) for prompt in request["prompts"]]
    began = time.perf_counter()
    mx.eval(opened.model.parameters())
    load_s = opening_s + time.perf_counter() - began
    load_peak = mx.get_peak_memory()
    # Ids that the embedding has, the same for every model of 98 rows and more. No end token stops the generation.
    spread = max(1, min(97, (opened.rows or 98) - 1))
    prompt = [1 + (7 * i) % spread for i in range(settings.prompt_tokens)]
    timings = _time_trials(opened.model, prompt, settings)
    peak, active = mx.get_peak_memory(), mx.get_active_memory()
    prompt_tps = [settings.prompt_tokens / first for first, _ in timings]
    generation_tps = [settings.generation_tokens / rest for _, rest in timings]
    speed = Speed(
        load_s=load_s,
        prompt_tps=statistics.median(prompt_tps),
        prompt_tps_spread=_spread(prompt_tps),
        generation_tps=statistics.median(generation_tps),
        generation_tps_spread=_spread(generation_tps),
        load_peak_memory_bytes=load_peak,
        peak_memory_bytes=peak,
        active_memory_bytes=active,
        device=mx.default_device().type.name,
        settings=settings,
        trials=len(timings),
        answers=tuple(_answer(opened, shown, tokens, request["answer_tokens"]) for shown, tokens in asked),
    )
    return asdict(speed)


def _time_trials(model: Any, prompt: list[int], settings: SpeedSettings) -> list[tuple[float, float]]:
    """Seconds of every trial (see ``_time_once``), after a warm-up."""
    import mlx.core as mx

    # A GPU compiles kernels by shape, so it warms up on the lengths it is timed on. A CPU only touches pages.
    if mx.default_device() == mx.Device(mx.cpu):
        _time_once(model, prompt[:4], 1)
    else:
        _time_once(model, prompt, settings.generation_tokens)
    mx.reset_peak_memory()
    began = time.perf_counter()
    timings = [_time_once(model, prompt, settings.generation_tokens)]
    while len(timings) < settings.trials and time.perf_counter() - began < settings.budget_s:
        timings.append(_time_once(model, prompt, settings.generation_tokens))
    return timings


def _time_once(model: Any, prompt: list[int], generation_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and from there over ``generation_tokens`` more."""
    import mlx.core as mx

    began = time.perf_counter()
    first = began
    for number, _ in enumerate(upstream.generate_step(model, mx.array(prompt), generation_tokens + 1)):
        if number == 0:
            first = time.perf_counter()
    return first - began, time.perf_counter() - first


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _last_words(prompt: str | Sequence[dict[str, str]]) -> str:
    """What of a prompt is shown above its answers: all of it, or the last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _answer(opened: Opened, shown: str, tokens: list[int], max_tokens: int) -> Answer:
    import mlx.core as mx

    mx.reset_peak_memory()
    spoken = speak(opened, tokens, max_tokens)
    return Answer(shown, spoken.text, spoken.generation_tps, mx.get_peak_memory())
