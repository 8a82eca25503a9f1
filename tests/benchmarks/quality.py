"""Distance from the original at the same bytes: mlxq's budgets against mlx-lm's own quantizers, in one run.

    python tests/benchmarks/quality.py MODEL [--work FOLDER] [--tokens 32768] [--peers NAME...]

MODEL is a folder, or ``sample``. Each peer runs as its own command in a process of its own; then mlxq gets exactly the
bits per weight that the peer came to (never more), and ``mlxq compare`` measures all of them on the shipped corpus'
evaluation half, which nothing is calibrated on. ``mlx_lm.dynamic_quant`` calibrates on the same text as mlxq does: its
own is downloaded where there is a network. The same command runs on a CPU, on Metal and on CUDA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

CONVERT = [sys.executable, "-m", "mlx_lm", "convert"]
# The peer's own program; on a CPU with the BLAS that mlxq uses, or its gradients would take hours.
DYNAMIC = [
    sys.executable,
    "-c",
    "from mlxq.machine.blas import load_blas; load_blas(); from mlx_lm.quant.dynamic_quant import main; main()",
]
MLXQ = [sys.executable, "-m", "mlxq"]
# name -> command after the model and output.
PEERS: dict[str, list[str]] = {
    "uniform 3-bit": ["-q", "--q-bits", "3"],
    "mixed_3_4": ["-q", "--quant-predicate", "mixed_3_4"],
    "mixed_3_6": ["-q", "--quant-predicate", "mixed_3_6"],
    "uniform 4-bit": ["-q", "--q-bits", "4"],
    "mixed_4_6": ["-q", "--quant-predicate", "mixed_4_6"],
    "uniform 4-bit, group 32": ["-q", "--q-bits", "4", "--q-group-size", "32"],
    "dynamic_quant 4.7": ["--target-bpw", "4.7"],
    "dynamic_quant 5.0": ["--target-bpw", "5.0"],
}


@dataclass(frozen=True)
class Made:
    """A folder that a program wrote, and the wall time it took."""

    folder: Path
    seconds: float


def timed(command: list[str], environment: dict[str, str], cwd: Path | None = None) -> float:
    began = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-4000:]}")
    return time.perf_counter() - began


def slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace(".", "_")


def make_peer(name: str, original: Path, work: Path, environment: dict[str, str]) -> Made:
    folder = work / slug(name)
    if not name.startswith("dynamic"):
        command = [*CONVERT, "--hf-path", str(original), "--mlx-path", str(folder), *PEERS[name]]
        return Made(folder, timed(command, environment))
    sensitivities, seconds = work / "dynamic" / "sensitivities.json", 0.0
    if not sensitivities.exists():
        seconds = estimate_sensitivities(original, sensitivities, environment)
    command = [*DYNAMIC, "--model", str(original), "--mlx-path", str(folder), "--sensitivities", str(sensitivities)]
    return Made(folder, seconds + timed([*command, *PEERS[name]], environment))


def estimate_sensitivities(original: Path, to: Path, environment: dict[str, str]) -> float:
    """``dynamic_quant``'s own estimate, which serves every target; the seconds it took.

    On a CPU from the same weights in fp32: MLX emulates bf16 there, a hundred times slower.
    """
    import mlx.core as mx

    to.parent.mkdir()
    model = original
    if mx.default_device() == mx.Device(mx.cpu):
        model = to.parent / "fp32"
        timed([*MLXQ, "convert", str(original), "-o", str(model), "--dtype", "float32"], environment)
    # It writes the estimate into the current folder, under a name made of the model's path.
    seconds = timed([*DYNAMIC, "--model", str(model), "--mlx-path", "unused"], environment, cwd=to.parent)
    next(to.parent.glob("*_sensitivities.json")).rename(to)
    return seconds


def facts_of(folder: Path) -> tuple[int, float]:
    """Weight bytes and bits per weight, as ``mlxq`` counts them from the files."""
    from mlxq.metrics.size import measure_size

    size = measure_size(folder)
    return size.weight_bytes, size.bits_per_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, default=Path("quality-work"))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--set", nargs="*", default=[], help="passed on to mlxq quantize")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True)

    from mlxq.calibration.text import corpus_text

    home = work / "home"
    text = home / ".cache/mlx-lm/calibration_v5.txt"
    text.parent.mkdir(parents=True)
    text.write_text(corpus_text("calibration"), encoding="utf-8")
    environment = {**os.environ, "HOME": str(home), "MLXQ_CACHE": str(work / "cache")}

    original = work / "original"
    timed([*MLXQ, "convert", arguments.model, "-o", str(original), "--dtype", "bfloat16"], environment)
    peers: dict[str, Made] = {}
    ours: dict[str, Made] = {}
    for name in arguments.peers:
        peers[name] = make_peer(name, original, work, environment)
        bpw = math.floor(facts_of(peers[name].folder)[1] * 1e5) / 1e5
        folder = work / f"mlxq-{slug(name)}"
        command = [*MLXQ, "quantize", str(original), "--bpw", str(bpw), "-o", str(folder), "--no-generate", "--quiet"]
        for setting in arguments.set:
            command += ["--set", setting]
        ours[name] = Made(folder, timed(command, environment))
        print(f"{name}: {peers[name].seconds:.0f} s, mlxq {ours[name].seconds:.0f} s", file=sys.stderr, flush=True)
    folders = [str(made[name].folder) for name in peers for made in (peers, ours)]
    command = [*MLXQ, "compare", str(original), *folders, "--no-speed", "--json", "--tokens", str(arguments.tokens)]
    compared = subprocess.run(command, capture_output=True, text=True, env=environment)
    if compared.returncode:
        raise SystemExit(compared.stderr[-4000:])
    facts = json.loads(compared.stdout)
    metrics = {model["name"]: model["metrics"] for model in facts["models"]}

    import mlx.core as mx

    print(f"Device: {mx.default_device()}; {facts['text']['tokens']} tokens of {facts['text']['name']}.\n")
    print("| peer | bits per weight | KL | seconds | mlxq: bits per weight | KL | seconds | KL ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name in peers:
        theirs, mine = metrics[peers[name].folder.name], metrics[ours[name].folder.name]
        print(
            f"| {name} | {theirs['bits_per_weight']:.3f} | {theirs['kl_mean']:.4f} ± {theirs['kl_mean_se']:.4f} "
            f"| {peers[name].seconds:.0f} | {mine['bits_per_weight']:.3f} "
            f"| {mine['kl_mean']:.4f} ± {mine['kl_mean_se']:.4f} | {ours[name].seconds:.0f} "
            f"| {mine['kl_mean'] / theirs['kl_mean']:.2f} |"
        )


if __name__ == "__main__":
    main()
