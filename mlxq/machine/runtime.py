"""What this machine is: device, BLAS, memory, versions."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxq import __version__
from mlxq.machine.backend import no_mlx
from mlxq.machine.blas import BlasInfo, load_blas, product_gflops
from mlxq.machine.versions import installed_version

# What `mlxq env` lists, in this order; those not installed are left out.
_PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "transformers", "huggingface_hub")


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


def environment() -> Environment:
    """Look at this machine. Imports ``mlx.core``, after ``load_blas``; asks no network and shows no token.

    Raises:
        BadInputError: ``$MLXQ_BLAS`` names a library that cannot be used.
    """
    import psutil

    blas = load_blas()
    memory = psutil.virtual_memory()
    device, device_name, gpu_bytes = _mlx_device()
    if device != "none":
        blas = replace(blas, gflops=product_gflops(device if blas.name == "cuBLAS" else "cpu"))
    installed = {name: version for name in _PACKAGES if (version := installed_version(name))}
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
    """The most memory this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file() and (peak_kib := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(peak_kib[1]) * 1024
    # In KiB but on macOS. On Linux it counts the program that started this one too, up to when it did.
    import resource  # Windows has none, and nothing there comes this far.

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory_bytes() -> int:
    """Memory that can be had without swapping, as ``psutil`` estimates it."""
    import psutil

    return int(psutil.virtual_memory().available)
