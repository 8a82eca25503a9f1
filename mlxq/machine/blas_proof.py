"""Whether a BLAS library computes what MLX needs on this CPU: tried in a process that may die of it, and remembered.

A library may be built for another processor than this one (its first product then ends in SIGILL), for other integers,
or badly. Nothing but trying tells, and trying must not take the run with it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError
from mlxq.headers import read_json
from mlxq.machine.blas_library import BlasFault, lend
from mlxq.machine.cache import cache_folder
from mlxq.machine.versions import installed_version

# Raised when the proof itself changes, so that older verdicts are not believed.
PROOF_VERSION = 1
# For a proof that takes a tenth of a second on an idle machine, and a hundred times that under an emulator.
TIME_LIMIT_S = 30.0
# How long a failure is believed: what a busy machine did to a good library should not last. A pass stays.
FAILURE_KEPT_S = 86400.0
_KEPT_VERDICTS = 64
# Settings that choose the kernels, the threads or the libraries below: another value is another proof.
_SETTINGS = ("OPENBLAS_", "OMP_", "GOTO_", "MKL_", "BLIS_", "NVPL_", "LD_")
# Lines of /proc/cpuinfo that say what the processor is, not how it does just now.
_CPU_LINES = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)
_MARK = "mlxq.blas "


@dataclass(frozen=True)
class Verdict:
    """What the proof of a library said: ``fault`` is None where it passed. ``lasting`` where it may be remembered."""

    fault: str | None
    lasting: bool = True


def verdict(library: Path) -> Verdict:
    """The remembered verdict on ``library``, else that of a proof now.

    Remembered for one state of the file (path, size, times), CPU model, version of MLX and set of BLAS settings. What
    cannot be read is not believed, and what cannot be written is not remembered.
    """
    key = _key(library)
    kept = _remembered()
    if key in kept and (kept[key]["fault"] is None or 0 <= time.time() - kept[key]["at"] < FAILURE_KEPT_S):
        return Verdict(kept[key]["fault"])
    found = prove(library)
    if found.lasting and key is not None:
        _remember(key, found)
    return found


def prove(library: Path) -> Verdict:
    """Let a child process load ``library`` as ``load_blas`` would, and compute with MLX on it."""
    code = "import sys; sys.path[:] = sys.argv[2:]; from mlxq.machine.blas_proof import _child; _child()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(library), *sys.path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return Verdict(f"hangs: it had not finished a few small matrices after {TIME_LIMIT_S:g} s")
    except OSError as exc:
        return Verdict(f"could not be tried: {exc}", lasting=False)
    if done.returncode < 0:
        coretype = os.environ.get("OPENBLAS_CORETYPE")
        under = f" under OPENBLAS_CORETYPE={coretype}" if coretype else ""
        # Killed from outside, for memory say, it may be a good library.
        lasting = -done.returncode != signal.SIGKILL
        return Verdict(f"crashes on this CPU ({_signal(-done.returncode)}){under}", lasting)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK) and done.returncode == 0:
            return Verdict(**json.loads(line.removeprefix(_MARK)))
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return Verdict(f"could not be tried: {last}", lasting=False)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _key(library: Path) -> str | None:
    """What a verdict depends on, hashed; None where this machine does not say what its CPU is."""
    cpu = _cpu_identity()
    if cpu is None:
        return None
    state = library.stat()
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))
    file = (str(library), state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    facts = [PROOF_VERSION, file, cpu, installed_version("mlx"), settings]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _cpu_identity() -> list[str] | None:
    """Model and instruction sets of every kind of core in this machine, or None where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    said = {line for line in lines if line.partition(":")[0].strip() in _CPU_LINES}
    return sorted({*said, *_features()}) if said else None


def _features() -> list[str]:
    """The instruction sets that programs may use, as the C library has them from the processor itself: an emulator
    shows programs its host's /proc/cpuinfo.
    """
    libc = ctypes.CDLL(None)
    libc.getauxval.restype = ctypes.c_ulong
    found = [f"AT_HWCAP {libc.getauxval(ctypes.c_ulong(kind))}" for kind in (16, 26)]
    leaf_of = getattr(libc, "__x86_get_cpuid_feature_leaf", None)  # glibc 2.33 and later, on x86
    if leaf_of is not None:
        leaf_of.restype = ctypes.POINTER(ctypes.c_uint32 * 8)
        # Leaves 1, 7, 0x80000001 and 0xd. Four words of each are what the processor says, the others what is usable.
        found += [f"leaf {leaf} {leaf_of(leaf).contents[4:]}" for leaf in range(4)]
    return found


def _file() -> Path:
    return cache_folder() / "blas.json"


def _remembered() -> dict[str, dict[str, Any]]:
    try:
        kept = read_json(_file())
        return {key: entry for key, entry in kept.items() if _sound(entry)}
    except (OSError, BadInputError):  # unreadable, damaged, of another shape, or no home
        return {}


def _sound(entry: object) -> bool:
    return (
        isinstance(entry, Mapping)
        and isinstance(entry.get("fault", 0), str | None)
        and isinstance(entry.get("at"), float)
    )


def _remember(key: str, found: Verdict) -> None:
    """Keep a verdict beside the newest others. The file is whole at all times; of two writers at once one wins."""
    kept = {**_remembered(), key: {"fault": found.fault, "at": time.time()}}
    newest = sorted(kept.items(), key=lambda item: item[1]["at"])[-_KEPT_VERDICTS:]
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_file().parent, prefix="blas.") as folder:
            whole = Path(folder, _file().name)
            whole.write_text(json.dumps(dict(newest)), encoding="utf-8")
            os.replace(whole, _file())
    except OSError:  # read-only, full, or no home: it is proved again next time
        return


def _child() -> None:
    """What the child process does: no core dump where it crashes, and the verdict on its last line."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        lend(Path(sys.argv[1]))
        found = Verdict(_wrong_result())
    except BlasFault as exc:
        found = Verdict(str(exc), exc.lasting)
    sys.stdout.write(_MARK + json.dumps(asdict(found)) + "\n")


def _wrong_result() -> str | None:
    """The first operation whose result is wrong, on the BLAS that this process has."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        for operation, found, right in _operations():
            # NaN is not within anything.
            if not bool(mx.all(mx.abs(found - right) <= 1e-4 * mx.abs(right).max()).item()):
                return f"computes {operation} wrong"
    return None


def _operations() -> Iterator[tuple[str, Any, Any]]:
    """Operations in fp32: what each is, what MLX made of it, and what its own element-wise arithmetic says.

    The elements are small integers, so that products are exact. Some sizes are small enough for the kernels that
    OpenBLAS has for small matrices, others are not.
    """
    import mlx.core as mx

    def integers(rows: int, columns: int) -> mx.array:
        return mx.random.randint(-4, 5, (rows, columns), key=mx.random.key(rows * columns)).astype(mx.float32)

    def plain(a: mx.array, b: mx.array) -> mx.array:
        return (a[:, :, None] * b[None]).sum(axis=1)

    for rows, inner, columns in ((5, 7, 3), (1, 257, 131), (131, 257, 67)):
        a, b = integers(rows, inner), integers(inner, columns)
        what = f"a product of {rows}x{inner} and {inner}x{columns}"
        yield what, a @ b, plain(a, b)
        yield f"{what}, transposed", mx.contiguous(a.T).T @ mx.contiguous(b.T).T, plain(a, b)
    n = 127
    one = mx.eye(n)
    regular = integers(n, n) + 8 * n * one
    definite = plain(integers(n, n), integers(n, n).T) + 8 * n * one
    lower = mx.linalg.cholesky(definite)
    yield "a Cholesky factor", plain(mx.tril(lower), mx.tril(lower).T), definite
    yield "an inverse by Cholesky factors", plain(mx.linalg.cholesky_inv(lower), definite), one
    yield "an inverse by LU factors", plain(mx.linalg.inv(regular), regular), one
    yield "a triangular inverse", plain(mx.linalg.tri_inv(mx.tril(regular)), mx.tril(regular)), one
    several = integers(n, 3)
    yield "a solution by LU factors", plain(regular, mx.linalg.solve(regular, several)), several
