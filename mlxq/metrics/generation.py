"""A short greedy generation: does the model answer, and how fast on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlxq import upstream

PROMPT = "In one or two sentences: why is the sky blue?"
MAX_TOKENS = 48


@dataclass(frozen=True)
class Generation:
    """One answer: ``prompt_tps`` and ``generation_tps`` are tokens per second, ``device`` where it ran."""

    prompt: str
    text: str
    prompt_tps: float
    generation_tps: float
    load_s: float
    device: str


def generate_once(folder: Path, prompt: str = PROMPT, max_tokens: int = MAX_TOKENS) -> Generation:
    """Load a model folder with ``mlx_lm`` and answer ``prompt`` greedily, in its chat template where it has one."""
    import time

    import mlx.core as mx

    began = time.perf_counter()
    model, tokenizer = upstream.load(folder)
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if on_cpu:
        # The CPU backend has no 16-bit arithmetic and emulates it ten times slower. The packed weights stay.
        model.set_dtype(mx.float32)
    load_s = time.perf_counter() - began
    if tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        tokens = tokenizer.encode(prompt)
    if not on_cpu:
        # A GPU's kernels are compiled when first met, which can take longer than the whole answer.
        for _ in upstream.stream_generate(model, tokenizer, tokens, 2):
            pass
    text, last = "", None
    for last in upstream.stream_generate(model, tokenizer, tokens, max_tokens):
        text += last.text
    return Generation(
        prompt=prompt,
        text=text.strip(),
        prompt_tps=last.prompt_tps if last else 0.0,
        generation_tps=last.generation_tps if last else 0.0,
        load_s=load_s,
        device="CPU, with fp32 activations" if on_cpu else "GPU",
    )
