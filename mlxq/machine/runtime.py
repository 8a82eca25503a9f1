"""What this machine is: device, BLAS, memory, versions."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq import __version__

# What `mlxq env` lists, in this order; those not installed are left out.
_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "huggingface_hub")


@dataclass(frozen=True)
class BlasInfo:
    """The BLAS that MLX's CPU backend uses. ``path`` is the library we loaded for it, or None; ``note`` says
    why.
    """

    name: str
    path: str | None
    note: str


@dataclass(frozen=True)
class Environment:
    """What ``mlxq env`` shows. Bytes throughout; None where the machine does not say."""

    versions: Mapping[str, str]
    system: str
    device: str
    device_name: str
    memory_bytes: int
    free_memory_bytes: int
    gpu_memory_bytes: int | None
    blas: BlasInfo
    hub_login: bool


def load_blas() -> BlasInfo:
    """Give MLX's CPU backend an optimised BLAS, where it has none and it is not too late.

    The Linux CPU wheel of MLX carries a reference BLAS. A library loaded earlier with ``RTLD_GLOBAL`` answers
    for its symbols, so this must run before ``mlx.core`` is imported. Takes OpenBLAS from ``cmeel-openblas``,
    else the system's. Does nothing where MLX has a GPU (macOS, CUDA). Never raises.
    """
    if sys.platform == "darwin":
        return BlasInfo("Accelerate", None, "MLX is linked to Apple's own")
    if sys.platform != "linux":
        return BlasInfo("built in", None, f"nothing to load on {sys.platform}")
    if cuda := _cuda_package():
        return BlasInfo("cuBLAS", None, f"MLX runs on the GPU ({cuda})")
    loaded = _loaded_openblas()
    if "mlx.core" in sys.modules:
        if loaded:
            return BlasInfo("OpenBLAS", loaded, "loaded before mlx.core")
        return BlasInfo("built in", None, "mlx.core was imported first, so its own BLAS stays")
    if loaded:
        return BlasInfo("OpenBLAS", loaded, "already loaded")
    fault = None
    for library in _openblas_libraries():
        fault = _load_fault(library)
        if fault and "libgfortran" in fault and _lend_gfortran():
            fault = _load_fault(library)
        if fault is None:
            _LOADED.append(library)
            return BlasInfo("OpenBLAS", library, "loaded for MLX's CPU backend")
    if fault:
        return BlasInfo("built in", None, f"OpenBLAS does not load: {fault}")
    return BlasInfo("built in", None, "no OpenBLAS found; pip install cmeel-openblas makes fp32 ten times faster")


# Libraries that load_blas() made global in this process. Others may be mapped privately (numpy, opencv ship
# their own), and those do not answer for MLX's symbols, so /proc/self/maps can't tell.
_LOADED: list[str] = []


def _loaded_openblas() -> str | None:
    return _LOADED[0] if _LOADED else None


def _load_fault(library: str) -> str | None:
    """Load a library so that its symbols answer for those of libraries loaded later; say why not, or None."""
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as exc:
        return str(exc)
    return None


def _lend_gfortran() -> bool:
    """Make ``libgfortran.so.5``, which ``cmeel-openblas`` needs, of the copy that MLX's own wheel carries.

    Many systems have none. The wheel's has a hash in its name, and the loader goes by the name inside the
    file, so load a copy, held in memory, whose inside name is the usual one.
    """
    libraries = Path(sysconfig.get_paths()["platlib"]) / "mlx_cpu.libs"
    carried = next(iter(sorted(libraries.glob("libgfortran-*.so.5*"))), None)
    if sys.platform != "linux" or carried is None:
        return False
    renamed = b"libgfortran.so.5"
    name, image = carried.name.encode() + b"\0", carried.read_bytes()
    if image.count(name) != 1:
        return False
    image = image.replace(name, renamed.ljust(len(name), b"\0"))
    for needed in libraries.glob("libquadmath-*"):
        _load_fault(str(needed))
    try:
        descriptor = os.memfd_create("libgfortran")
    except OSError:
        return False
    with open(descriptor, "wb") as file:
        file.write(image)
        file.flush()
        return _load_fault(f"/proc/self/fd/{descriptor}") is None


def _cuda_package() -> str | None:
    """``name version`` of MLX's CUDA backend where one is installed."""
    for name in ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13"):
        if version := _version(name):
            return f"{name} {version}"
    return None


def _openblas_libraries() -> Iterator[str]:
    """Where an OpenBLAS may be, best first."""
    for key in ("purelib", "platlib"):
        library = Path(sysconfig.get_paths()[key]) / "cmeel.prefix" / "lib" / "libopenblas.so"
        if library.is_file():
            yield str(library)
    machine = platform.machine()
    for folder in (f"/usr/lib/{machine}-linux-gnu", "/usr/lib64", "/usr/lib"):
        for name in ("libopenblas.so.0", "libopenblas.so", "libopenblasp.so.0"):
            if (library := Path(folder) / name).is_file():
                yield str(library)
    # Last, as it runs ldconfig.
    if found := ctypes.util.find_library("openblas"):
        yield found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> Environment:
    """Look at this machine. Imports ``mlx.core``, after ``load_blas``; asks no network and shows no token."""
    import psutil

    blas = load_blas()
    memory = psutil.virtual_memory()
    device, device_name, gpu_bytes = _mlx_device()
    installed = {name: version for name in _PACKAGES if (version := _version(name))}
    return Environment(
        versions={"mlxq": __version__, **installed, "python": platform.python_version()},
        system=_system(),
        device=device,
        device_name=device_name,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        gpu_memory_bytes=gpu_bytes,
        blas=blas,
        hub_login=logged_in(),
    )


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _mlx_device() -> tuple[str, str, int | None]:
    """Default device (``gpu`` or ``cpu``), its name, and the bytes MLX should use of it."""
    try:
        import mlx.core as mx
    except ImportError as exc:
        from mlxq.machine.backend import no_mlx

        return "none", no_mlx(exc).message, None
    # device_info moved from mx.metal to mx, and its keys differ between backends.
    ask = getattr(mx, "device_info", None) or getattr(getattr(mx, "metal", None), "device_info", None)
    info: Mapping[str, Any] = ask() if ask else {}
    device = "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    share = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return (
        device,
        str(info.get("device_name", platform.processor() or platform.machine())),
        (int(share) if device == "gpu" and share else None),
    )


def logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def peak_rss_bytes() -> int:
    """The most memory this process has held so far (``ru_maxrss``: KiB on Linux, bytes on macOS)."""
    import resource  # Windows has none, and nothing there comes this far.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, as ``psutil`` estimates it."""
    import psutil

    return int(psutil.virtual_memory().available)
