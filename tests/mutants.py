"""How much of one file the tests watch: mutants of it, made by mutmut, and how many of them its tests kill.

    python -m tests.mutants mlxq/budget/allocate.py [--sample 60]

``TESTS`` says which tests a file answers to; ``[tool.mutmut]`` in ``pyproject.toml`` says what is mutated and how
tests are run. Works in ``mutants/``, which is made anew each time. What survives is shown as a diff.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A file of the core -> the tests that watch it, fastest first.
TESTS = {
    "mlxq/recipe/gates.py": ("tests/test_gates.py",),
    "mlxq/recipe/match.py": ("tests/test_match.py",),
    "mlxq/machine/memory.py": ("tests/test_fit.py",),
    "mlxq/architecture/kv_cache.py": ("tests/test_kv_cache.py",),
    "mlxq/planning/decide.py": ("tests/test_decide.py", "tests/test_plan.py"),
    "mlxq/planning/layout.py": ("tests/test_decide.py",),
    "mlxq/planning/make.py": ("tests/test_decide.py", "tests/test_plan.py"),
    "mlxq/budget/allocate.py": ("tests/test_allocate.py",),
    "mlxq/budget/rivals.py": ("tests/test_rivals.py",),
    "mlxq/budget/scoring.py": ("tests/test_spend.py",),
    "mlxq/budget/spend.py": ("tests/test_spend.py",),
    "mlxq/metrics/faithfulness.py": ("tests/test_faithfulness.py",),
    "mlxq/methods/affine_fit.py": ("tests/test_affine_fit.py",),
    "mlxq/methods/gptq.py": ("tests/test_gptq.py",),
    "mlxq/calibration/sensitivity.py": ("tests/test_calibration.py",),
}
SEED = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("file", choices=sorted(TESTS), metavar="FILE", help="one of: " + ", ".join(sorted(TESTS)))
    parser.add_argument("--sample", type=int, help="run so many of the mutants, chosen by a fixed seed")
    parser.add_argument("--children", type=int, default=os.cpu_count(), help="mutants tested at a time")
    asked = parser.parse_args()
    os.chdir(ROOT)
    shutil.rmtree("mutants", ignore_errors=True)
    # Products of tiny matrices gain nothing by threads, and several processes share the cores.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    return report(asked.file, run(asked.file, asked.sample, asked.children))


def run(file: str, sample: int | None, children: int) -> dict[str, str]:
    """Test the mutants of ``file``, all or a sample; what became of each, by its name."""
    from mutmut import __main__ as mutmut
    from mutmut.configuration import config
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths

    config().only_mutate = [file]
    config().pytest_add_cli_args_test_selection = list(TESTS[file])
    Path("mutants").mkdir()
    copy_src_dir()
    copy_also_copy_files()
    setup_source_paths()
    mutmut.create_mutants(children)
    names = sorted(name for _, name, _ in mutmut.collect_source_file_mutation_data(mutant_names=())[0])
    if sample is not None and sample < len(names):
        names = sorted(random.Random(SEED).sample(names, sample))
    mutmut._run(names, children)
    tested, _ = mutmut.collect_source_file_mutation_data(mutant_names=names)
    return {name: status_by_exit_code[code] for _, name, code in tested}


def report(file: str, found: dict[str, str]) -> int:
    """Print what survived and the share killed; 1 where that is under 85%."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    counts = Counter(found.values())
    # A mutant that never ends is noticed as surely as one that fails.
    killed = sum(counts[status] for status in ("killed", "timeout", "segfault"))
    for name, status in found.items():
        if status not in ("killed", "timeout", "segfault"):
            print(f"{status}: {name}")
            lines = get_diff_for_mutant(name, path=Path(file)).splitlines()
            print(*(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")), sep="\n")
    share = killed / len(found)
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    print(f"{file}: {len(found)} mutants, {said}: {share:.1%} killed")
    return 0 if share >= 0.85 else 1


if __name__ == "__main__":
    sys.exit(main())
