"""Wall time and peak memory of mlxq against ``mlx_lm.convert -q`` on the shape of a real model, in one run.

    python tests/benchmarks/streaming.py [--work FOLDER] [--trials 3]

Writes a checkpoint with the shape of Llama-3.2-3B (6.4 GB, random bf16 weights) under the work folder, then runs both
programs in turn, several trials each, and prints the medians as a Markdown table. Needs 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 3072,
    "num_hidden_layers": 28,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def make_checkpoint(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    """Random weights of a Llama's names and shapes, in two files, written piece by piece."""
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from mlxq.headers import encode_header
    from mlxq.tensors import TensorSpec
    from tests.checkpoints import make_tokenizer

    h, m, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (h,),
            f"{layer}.post_attention_layernorm.weight": (h,),
            f"{layer}.self_attn.q_proj.weight": (h, h),
            f"{layer}.self_attn.k_proj.weight": (kv, h),
            f"{layer}.self_attn.v_proj.weight": (kv, h),
            f"{layer}.self_attn.o_proj.weight": (h, h),
            f"{layer}.mlp.gate_proj.weight": (m, h),
            f"{layer}.mlp.up_proj.weight": (m, h),
            f"{layer}.mlp.down_proj.weight": (h, m),
        }
    folder.mkdir(parents=True)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    weight_map = {}
    generator = np.random.default_rng(0)
    # bf16 bits of small normal numbers: one pool, cut at random places, is random enough to time a quantizer on.
    pool = (generator.standard_normal(1 << 24).astype(np.float32) * 0.02).view(np.uint32) >> 16
    pool16 = pool.astype(np.uint16)
    for number, part in enumerate((specs[: len(specs) // 2], specs[len(specs) // 2 :]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(encode_header(part, {"format": "pt"}))
            for spec in part:
                left = spec.size
                while left:
                    start = int(generator.integers(0, pool16.size // 2))
                    piece = pool16[start : start + min(left, pool16.size // 2)]
                    stream.write(piece.tobytes())
                    left -= piece.size
                weight_map[spec.name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer(folder)


MEASURE = """
import resource, runpy, sys, time
sys.argv = sys.argv[1:]
began = time.perf_counter()
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as exit:
    assert not exit.code, exit.code
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print("MEASURED", time.perf_counter() - began, peak, file=sys.stderr)
"""


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident bytes of ``python -m ARGUMENTS``."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    line = next((x for x in done.stderr.splitlines() if x.startswith("MEASURED")), None)
    if line is None:
        raise SystemExit(done.stderr)
    _, seconds, peak = line.split()
    return float(seconds), float(peak)


def main() -> None:
    """Build the checkpoint where it is missing, run both programs in turn, print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("streaming-benchmark"))
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    model, out = options.work / "model", options.work / "out"
    if not model.exists():
        make_checkpoint(model)
    programs = {
        "mlxq quantize 4bit": [
            "mlxq",
            "quantize",
            "4bit",
            "--model",
            str(model),
            "-o",
            str(out),
            "--no-generate",
        ],
        "mlx_lm.convert -q": ["mlx_lm.convert", "--hf-path", str(model), "--mlx-path", str(out), "-q"],
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(options.trials):
        # Neither program is to pay for a cold disk that the other finds warm.
        for file in model.glob("*.safetensors"):
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
        for name, arguments in programs.items():
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
            seen[name].append(measure(arguments))
            time.sleep(1)
    print("| program | wall time, median (s) | all (s) | peak memory (GB) |\n|---|---|---|---|")
    median = {n: (statistics.median(t for t, _ in r), statistics.median(p for _, p in r)) for n, r in seen.items()}
    for name, runs in seen.items():
        seconds, peak = median[name]
        print(f"| `{name}` | {seconds:.1f} | {', '.join(f'{t:.1f}' for t, _ in runs)} | {peak / 1e9:.2f} |")
    (t1, p1), (t2, p2) = median.values()
    print(f"| ratio | {t1 / t2:.2f} | | {p1 / p2:.2f} |")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
