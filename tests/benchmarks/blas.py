"""What MLX reaches on a CPU with its own BLAS, with the one that mlxq chooses, and with the system's OpenBLAS.

    python tests/benchmarks/blas.py [--system LIBRARY] [--trials 5]

Each trial is a process of its own that takes its turn: products in fp32 of two sizes, and a Cholesky factorisation of
2,048 rows. The best of the trials counts, as all that disturbs a process only slows it. Prints a Markdown table; the
exit code is 1 where the chosen library is below 0.9 of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OWN, CHOSEN, SYSTEM = "MLX's own", "the chosen one", "the system's"
DEBIAN = f"/usr/lib/{platform.machine()}-linux-gnu/libopenblas.so.0"
TASKS = ("product 1,024 (GFLOP/s)", "product 512x576x1,536 (GFLOP/s)", "Cholesky 2,048 (s)")


def measure() -> None:
    """One trial, in a process that ``MLXQ_BLAS`` steers."""
    from mlxq.machine.blas import load_blas

    info = load_blas()
    import mlx.core as mx

    def normal(*shape: int) -> mx.array:
        made = mx.random.normal(shape, key=mx.random.key(0))
        mx.eval(made)
        return made

    def seconds(work: object) -> float:
        assert callable(work)
        taken = []
        for _ in range(4):
            began = time.perf_counter()
            mx.eval(work())
            taken.append(time.perf_counter() - began)
        return min(taken[1:])

    with mx.stream(mx.cpu):
        square, tokens, weights, many = normal(1024, 1024), normal(512, 576), normal(576, 1536), normal(2048, 256)
        definite = many @ many.T + 256 * mx.eye(2048)
        mx.eval(definite)
        results = (
            2 * 1024**3 / seconds(lambda: square @ square) / 1e9,
            2 * 512 * 576 * 1536 / seconds(lambda: tokens @ weights) / 1e9,
            seconds(lambda: mx.linalg.cholesky(definite)),
        )
    print(json.dumps([info.path, info.kernel, results]))


def main() -> None:
    """Take turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default=DEBIAN, help="the system's library")
    parser.add_argument("--trials", type=int, default=5)
    arguments = parser.parse_args()
    settings = {OWN: "none", CHOSEN: "", SYSTEM: arguments.system}
    if not Path(arguments.system).exists():
        del settings[SYSTEM]
    best: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for trial in range(arguments.trials):
            for name, asked in settings.items():
                done = subprocess.run(
                    [sys.executable, __file__, "measure"],
                    env={**os.environ, "MLXQ_BLAS": asked, "MLXQ_CACHE": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                path, kernel, results = json.loads(done.stdout.splitlines()[-1])
                if trial == 0:
                    print(f"{name}: {path or 'built in'}, {kernel or 'no kernels to choose from'}", file=sys.stderr)
                before = best.get(name, results)
                best[name] = [
                    max(a, b) if "GFLOP/s" in t else min(a, b) for t, a, b in zip(TASKS, before, results, strict=True)
                ]
    print(f"| BLAS | {' | '.join(TASKS)} |\n|---|{'---:|' * len(TASKS)}")
    for name, results in best.items():
        print(f"| {name} | {results[0]:.1f} | {results[1]:.1f} | {results[2]:.3f} |")
    fastest = [(max if "GFLOP/s" in task else min)(r[at] for r in best.values()) for at, task in enumerate(TASKS)]
    ratios = [
        chosen / most if "GFLOP/s" in task else most / chosen
        for task, chosen, most in zip(TASKS, best[CHOSEN], fastest, strict=True)
    ]
    print(f"| the chosen one, of the best | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    sys.exit(min(ratios) < 0.9)


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["measure"] else main()
