"""Speed and memory of a model folder as ``mlx_lm`` runs it, each model timed in a process of its own.

``python -m mlxq.metrics.speed`` is that process; it reads a request and writes a result, both JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxq.errors import MlxqError

# The child's stdout belongs to whatever it imports; its result follows this mark.
_MARK = "mlxq-speed-result:"


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
    folder: Path, settings: SpeedSettings, prompts: Sequence[Any] = (), *, answer_tokens: int = 128
) -> Speed:
    """Time ``folder`` in a new process. ``prompts`` are strings or lists of chat messages, answered greedily.

    Raises MlxqError with the child's last line where it fails.
    """
    request = {
        "folder": str(folder),
        "settings": asdict(settings),
        "prompts": list(prompts),
        "answer_tokens": answer_tokens,
    }
    child = subprocess.run(
        [sys.executable, "-m", "mlxq.metrics.speed"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    _, mark, result = child.stdout.rpartition(_MARK)
    if child.returncode or not mark:
        last = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise MlxqError(f"timing {folder} failed: {last}", "--no-speed leaves the timing out.")
    found = json.loads(result)
    found["settings"] = SpeedSettings(**found["settings"])
    found["answers"] = tuple(Answer(**answer) for answer in found["answers"])
    return Speed(**found)


def _time_model(folder: Path, settings: SpeedSettings, prompts: Sequence[Any], answer_tokens: int) -> Speed:
    """Load, warm up, time, and answer, in this process."""
    import mlx.core as mx
    import mlx_lm

    mx.reset_peak_memory()
    began = time.perf_counter()
    model, tokenizer = mlx_lm.load(str(folder))
    load_s = time.perf_counter() - began
    load_peak = mx.get_peak_memory()
    # Token ids that any vocabulary has; the same for every model. Generation is not to stop at an end token.
    prompt = [1 + (7 * i) % 97 for i in range(settings.prompt_tokens)]
    timings = _time_trials(model, prompt, settings)
    peak, active = mx.get_peak_memory(), mx.get_active_memory()
    prompt_tps = [settings.prompt_tokens / first for first, _ in timings]
    generation_tps = [settings.generation_tokens / rest for _, rest in timings]
    return Speed(
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
        answers=tuple(_answer(model, tokenizer, prompt, answer_tokens) for prompt in prompts),
    )


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
    from mlx_lm.generate import generate_step

    began = time.perf_counter()
    first = began
    for number, _ in enumerate(generate_step(mx.array(prompt), model, max_tokens=generation_tokens + 1)):
        if number == 0:
            first = time.perf_counter()
    return first - began, time.perf_counter() - first


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def _answer(model: Any, tokenizer: Any, prompt: str | list[Mapping[str, str]], max_tokens: int) -> Answer:
    """Answer greedily, in the chat template where the tokenizer has one."""
    import mlx.core as mx
    import mlx_lm

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    shown = messages[-1]["content"]
    if tokenizer.chat_template is not None:
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        tokens = tokenizer.encode(shown)
    mx.reset_peak_memory()
    text, tps = "", 0.0
    for part in mlx_lm.stream_generate(model, tokenizer, prompt=tokens, max_tokens=max_tokens):
        text, tps = text + part.text, part.generation_tps
    return Answer(shown, text.strip(), tps, mx.get_peak_memory())


def _child() -> None:
    from mlxq.machine.blas import load_blas

    load_blas()
    request = json.load(sys.stdin)
    speed = _time_model(
        Path(request["folder"]),
        SpeedSettings(**request["settings"]),
        request["prompts"],
        request["answer_tokens"],
    )
    sys.stdout.write(_MARK + json.dumps(asdict(speed)) + "\n")


if __name__ == "__main__":
    _child()
