"""Tokens per second of evaluating perplexity: mlxq against ``mlx_lm.perplexity``, same model and token ids, in one run.

    python tests/benchmarks/perplexity.py MODEL... [--tokens 1024]

MODELs are folders, such as the sample in bf16 and at 4 bits. Each program runs in a process of its own: mlxq loads an
OpenBLAS before MLX where there is one, ``mlx_lm.perplexity`` is left as it comes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

SEQUENCE = 256

THEIRS = """
import json, sys, time
import numpy as np, mlx.core as mx
from mlx_lm import load
from mlx_lm.perplexity import eval_ppl
folder, ids = sys.argv[1], np.array(json.load(sys.stdin))
model, _ = load(folder)
began = time.perf_counter()
ppl = eval_ppl(model, mx.array(ids), batch_size=1)[0]
print("RESULT", json.dumps([float(ppl), time.perf_counter() - began]))
"""

OURS = """
import json, sys, time
from pathlib import Path
from mlxq.machine.blas import load_blas
load_blas()
import numpy as np, mlx.core as mx
from mlxq.comparison.measure import stored_candidate
from mlxq.metrics.faithfulness import measure_faithfulness
from mlxq.metrics.evaluation import evaluation_model
from mlxq.metrics.reference import build_reference
from mlxq.sources.safetensors import open_folder
folder, ids = sys.argv[1], np.array(json.load(sys.stdin), dtype=np.int32)
candidate = stored_candidate("m", open_folder(Path(folder), folder))
model = evaluation_model(candidate.load())
batches = [(mx.array(ids[:, :-1]), mx.array(ids[:, 1:]))]
def drain(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
# Building the reference leaves of its model only the head, so what is measured is loaded for itself.
held = drain(build_reference(evaluation_model(candidate.load()), [tokens for tokens, _ in batches]))
began = time.perf_counter()
found = drain(measure_faithfulness(held, model, batches))
print("RESULT", json.dumps([found.ppl, time.perf_counter() - began]))
"""


def token_ids(folder: str, tokens: int) -> list[list[int]]:
    """Sequences of the shipped evaluation text, ``SEQUENCE + 1`` ids each."""
    from mlx_lm.utils import load_tokenizer

    from mlxq.calibration.text import corpus_text

    ids = load_tokenizer(folder).encode(corpus_text())
    width = SEQUENCE + 1
    return [ids[i : i + width] for i in range(0, len(ids) - width, width)][: max(1, tokens // SEQUENCE)]


def measure(program: str, folder: str, ids: list[list[int]]) -> tuple[float, float]:
    """Perplexity, and seconds of the evaluation alone."""
    done = subprocess.run(
        [sys.executable, "-c", program, folder], input=json.dumps(ids), capture_output=True, text=True, check=False
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if line is None:
        raise SystemExit(done.stderr)
    ppl, seconds = json.loads(line.removeprefix("RESULT"))
    return ppl, seconds


def main() -> None:
    """Measure every model with both programs in turn; print medians as a Markdown table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    print("| model | tokens | mlx_lm.perplexity, tokens/s | mlxq, tokens/s | ratio | perplexity of each |")
    print("|---|---:|---:|---:|---:|---:|")
    for folder in options.models:
        ids = token_ids(folder, options.tokens)
        count = len(ids) * SEQUENCE
        runs = [(measure(THEIRS, folder, ids), measure(OURS, folder, ids)) for _ in range(options.trials)]
        theirs, ours = (count / statistics.median(run[i][1] for run in runs) for i in (0, 1))
        perplexities = f"{runs[0][0][0]:.3f}, {runs[0][1][0]:.3f}"
        print(f"| {folder} | {count} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.1f} | {perplexities} |", flush=True)


if __name__ == "__main__":
    main()
