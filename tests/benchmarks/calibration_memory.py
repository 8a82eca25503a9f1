"""Peak memory of a whole budget run, scores, check and encoding, for models that differ only in depth.

    python -m tests.benchmarks.calibration_memory [--work FOLDER] [--layers 8 32]

Writes checkpoints of random bf16 weights under the work folder and spends a budget on each, a process of its own. What
calibration holds is a block with its gradients and the inputs of all blocks, so memory should grow with depth by those
inputs alone, and not by the weights.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from tests.benchmarks.streaming import CONFIG, make_checkpoint, measure

WIDTH, TOKENS = 1024, 2048
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 4096,
}
BUDGET = ["--bpw", "5", "--set", "options=[4, 6]", "--set", "method=fit", "--set", f"calibration.tokens={TOKENS}"]


def main() -> None:
    """Build the checkpoints that are missing, spend a budget on each, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("calibration-memory"))
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    options = parser.parse_args()
    print("| blocks | weights in fp32 (GB) | inputs of all blocks (GB) | peak memory (GB) | seconds |")
    print("|---|---|---|---|---|")
    cache = options.work / "cache"
    os.environ["MLXQ_CACHE"] = str(cache)
    for layers in options.layers:
        model, out = options.work / f"{layers}-blocks", options.work / "out"
        if not model.exists():
            make_checkpoint(model, {**CONFIG, **SHAPE, "num_hidden_layers": layers})
        for earlier in (out, cache):
            shutil.rmtree(earlier, ignore_errors=True)
        took = measure(["mlxq", "quantize", str(model), *BUDGET, "-o", str(out), "--no-generate", "--quiet"])
        weights = 2 * sum(file.stat().st_size for file in model.glob("*.safetensors"))
        inputs = layers * TOKENS * WIDTH * 4
        print(
            f"| {layers} | {weights / 1e9:.2f} | {inputs / 1e9:.2f} | {took.peak_bytes / 1e9:.2f} "
            f"| {took.wall_s:.0f} |",
            flush=True,
        )
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
