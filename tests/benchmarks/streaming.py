"""Wall time, CPU time and peak memory of mlxq against ``mlx_lm.convert -q`` on the shape of a real model, in one run.

    python tests/benchmarks/streaming.py [--work FOLDER] [--trials 3] [--layers 28]

Writes a checkpoint with the shape of Llama-3.2-3B (6.4 GB, random bf16 weights) under the work folder, then runs both
programs in turn, several trials each, and prints the CPU and the medians as a Markdown table. Needs 14 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import astuple, dataclass
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
wall = time.perf_counter() - began
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(each.ru_utime + each.ru_stime for each in used)
from mlxq.machine.runtime import peak_rss_bytes
print("MEASURED", wall, cpu, peak_rss_bytes(), file=sys.stderr)
"""


@dataclass(frozen=True)
class Measured:
    """One run: wall and CPU seconds (user and system, of all threads and children), peak resident bytes."""

    wall_s: float
    cpu_s: float
    peak_bytes: float


def measure(arguments: list[str]) -> Measured:
    """Run ``python -m ARGUMENTS``; what it says is shown where it fails."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=False)
    line = next((x for x in done.stderr.splitlines() if x.startswith("MEASURED")), None)
    if line is None:
        raise SystemExit(done.stderr)
    return Measured(*map(float, line.split()[1:]))


def processor() -> str:
    """What the ratio depends on: the CPU's model, its widest vector instructions, and how many cores we may use."""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        return f"{model}, {os.cpu_count()} cores"
    facts = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()]
    known = {key.strip(): value.strip() for key, _, value in reversed(facts)}
    flags = known.get("flags", "").split()
    vectors = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    logical = os.sched_getaffinity(0)
    topology = [Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in logical]
    cores = len({file.read_text(encoding="utf-8") for file in topology if file.is_file()}) or len(logical)
    parts = (known.get("model name", platform.machine()), vectors, f"{len(logical)} threads on {cores} cores")
    return ", ".join(part for part in parts if part)


def main() -> None:
    """Build the checkpoint where it is missing, run both programs in turn, print medians and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=Path("streaming-benchmark"))
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer make a smaller model")
    options = parser.parse_args()
    model, out = options.work / f"model-{options.layers}", options.work / "out"
    if not model.exists():
        make_checkpoint(model, {**CONFIG, "num_hidden_layers": options.layers})
    quantize = ["mlxq", "quantize", "4bit", "--model", str(model), "-o", str(out), "--no-generate"]
    convert = ["mlx_lm.convert", "--hf-path", str(model), "--mlx-path", str(out), "-q"]
    programs = {"mlxq quantize 4bit": quantize, "mlx_lm.convert -q": convert}
    seen: dict[str, list[Measured]] = {name: [] for name in programs}
    for _ in range(options.trials):
        # Neither program is to pay for a cold disk that the other finds warm.
        for file in model.glob("*.safetensors"):
            subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
        for name, arguments in programs.items():
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(out.with_name("out.partial"), ignore_errors=True)
            # Nor is one to wait while the system writes what the other left.
            os.sync()
            seen[name].append(measure(arguments))
    shutil.rmtree(out, ignore_errors=True)
    print(f"{processor()}\n")
    print(
        "| program | wall time, median (s) | all (s) | CPU time, median (s) | peak memory (GB) |\n|---|---|---|---|---|"
    )
    medians = {name: median_of(runs) for name, runs in seen.items()}
    for name, one in medians.items():
        walls = ", ".join(f"{run.wall_s:.1f}" for run in seen[name])
        print(f"| `{name}` | {one.wall_s:.1f} | {walls} | {one.cpu_s:.1f} | {one.peak_bytes / 1e9:.2f} |")
    ours, theirs = medians.values()
    pairs = ", ".join(f"{a.wall_s / b.wall_s:.2f}" for a, b in zip(*seen.values(), strict=True))
    wall, cpu = ours.wall_s / theirs.wall_s, ours.cpu_s / theirs.cpu_s
    print(f"| ratio | {wall:.2f} | {pairs} | {cpu:.2f} | {ours.peak_bytes / theirs.peak_bytes:.2f} |")


def median_of(runs: list[Measured]) -> Measured:
    """The median of each figure."""
    return Measured(*(statistics.median(column) for column in zip(*map(astuple, runs), strict=True)))


if __name__ == "__main__":
    main()
