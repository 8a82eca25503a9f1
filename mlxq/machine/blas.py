"""The BLAS that MLX computes with on a CPU: the first one at hand that is proved to work here."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxq.errors import BadInputError
from mlxq.machine.blas_library import BlasFault, lend
from mlxq.machine.blas_proof import verdict
from mlxq.machine.versions import installed_version


@dataclass(frozen=True)
class PassedOver:
    """A library that is not used, and why."""

    library: str
    why: str


@dataclass(frozen=True)
class BlasInfo:
    """The BLAS that MLX's CPU backend uses.

    ``path`` is the library that ``load_blas`` lent to it, or None; ``note`` says why. ``kernel`` is what an OpenBLAS
    chose for this CPU. ``gflops`` is what one product reached, where it was measured (``product_gflops``).
    """

    name: str
    path: str | None
    note: str
    kernel: str | None = None
    gflops: float | None = None
    passed_over: tuple[PassedOver, ...] = ()


# Where an OpenBLAS of the system may be, or one of the environment that Python lies in (conda).
_FOLDERS = (
    f"{sys.prefix}/lib",
    "/usr/local/lib",
    f"/usr/lib/{platform.machine()}-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
)

# What load_blas() lent in this process: it cannot be taken back.
_lent: list[BlasInfo] = []


def load_blas() -> BlasInfo:
    """Give MLX's CPU backend an optimised BLAS, where it has none and it is not too late.

    The Linux CPU wheel of MLX carries a reference BLAS. Takes the first library that is proved to work on this CPU:
    the one that ``$MLXQ_BLAS`` names; else OpenBLAS from ``scipy-openblas32``; else the system's OpenBLAS. Where none
    is, or ``MLXQ_BLAS=none``, MLX's own stays. Must run before ``mlx.core`` is imported. Does nothing where MLX has a
    GPU (macOS, CUDA).

    Raises:
        BadInputError: ``$MLXQ_BLAS`` names a library that cannot be used.
    """
    if sys.platform == "darwin":
        return BlasInfo("Accelerate", None, "MLX is linked to Apple's own")
    if sys.platform != "linux":
        return BlasInfo("built in", None, f"nothing to load on {sys.platform}")
    if cuda := _cuda_package():
        return BlasInfo("cuBLAS", None, f"MLX runs on the GPU ({cuda})")
    if _lent:
        return _lent[0]
    if "mlx.core" in sys.modules:
        return BlasInfo("built in", None, "mlx.core was imported first, so its own BLAS stays")
    asked = os.environ.get("MLXQ_BLAS")
    if asked == "none":
        return BlasInfo("built in", None, "MLX's own, as MLXQ_BLAS=none asks")
    if hasattr(ctypes.CDLL(None), "cblas_sgemm"):
        return BlasInfo("preloaded", None, "a library that this process was started with answers for MLX's BLAS")
    found = _named(asked) if asked else _first_that_works()
    if found.path:
        _lent.append(found)
    return found


def _named(asked: str) -> BlasInfo:
    """The library that ``$MLXQ_BLAS`` names. It is proved like any other, and nothing is tried in its place."""
    path = Path(os.path.realpath(os.path.expanduser(asked)))
    hint = (
        "Name a shared library with CBLAS and LAPACK (32-bit integers) that runs on this CPU, set MLXQ_BLAS=none for "
        "MLX's own, or unset it to have one chosen."
    )
    if not os.path.isfile(path):
        raise BadInputError(f"MLXQ_BLAS={asked}: no such file", hint)
    try:
        return _proved(path, "MLXQ_BLAS names it")
    except BlasFault as exc:
        raise BadInputError(f"MLXQ_BLAS={asked}: {exc}", hint) from exc


def _first_that_works() -> BlasInfo:
    passed_over: list[PassedOver] = []
    for path in _openblas_libraries():
        try:
            return _proved(path, "proved on this CPU", tuple(passed_over))
        except BlasFault as exc:
            passed_over.append(PassedOver(str(path), str(exc)))
    if passed_over:
        return BlasInfo("built in", None, "MLX's own, as no other works here", passed_over=tuple(passed_over))
    note = "MLX's own, as no OpenBLAS is found; pip install scipy-openblas32 makes fp32 ten times faster"
    return BlasInfo("built in", None, note)


def _proved(path: Path, note: str, passed_over: tuple[PassedOver, ...] = ()) -> BlasInfo:
    """Lend a library to MLX once it is proved. Raises BlasFault where it fails the proof, or does not load after it."""
    said = verdict(path)
    if said.fault is not None:
        raise BlasFault(said.fault, lasting=said.lasting)
    kernel = lend(path)
    return BlasInfo("OpenBLAS" if kernel else path.name, str(path), note, kernel, passed_over=passed_over)


def _openblas_libraries() -> Iterator[Path]:
    """Where an OpenBLAS may be, best first, each file once."""
    seen = set()
    for path in (*_packaged(), *_installed()):
        file = Path(os.path.realpath(path))
        # Not Path.is_file, which raises where a folder may not be entered.
        if os.path.isfile(file) and file not in seen:
            seen.add(file)
            yield file


def _packaged() -> Iterator[Path]:
    # Not imported: that would load it, whether it works here or not.
    spec = importlib.util.find_spec("scipy_openblas32")
    for folder in (spec and spec.submodule_search_locations) or ():
        yield from sorted(Path(folder, "lib").glob("libscipy_openblas*.so"))


def _installed() -> Iterator[Path]:
    asked = [folder for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    for folder in (*asked, *_FOLDERS):
        for name in ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0"):
            yield Path(folder, name)


def _cuda_package() -> str | None:
    """``name version`` of MLX's CUDA backend where one is installed."""
    for name in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"):
        if version := installed_version(name):
            return f"{name} {version}"
    return None


def product_gflops(device: str = "cpu", size: int = 768) -> float:
    """GFLOP/s of one ``size`` x ``size`` product in fp32 by MLX on ``cpu`` or ``gpu``: the best of three, after one
    that warms up.
    """
    import mlx.core as mx

    with mx.stream(mx.gpu if device == "gpu" else mx.cpu):
        a, b = mx.random.normal((2, size, size), key=mx.random.key(0))
        mx.eval(a @ b)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            mx.eval(a @ b)
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9
