"""The door to MLX: every command that needs it passes here before anything else imports it."""

from __future__ import annotations

import platform

from mlxq.errors import BadInputError
from mlxq.machine.blas import load_blas


def start_mlx() -> None:
    """Load a BLAS for MLX's CPU backend, then MLX. Raises BadInputError where there is no MLX for this machine."""
    load_blas()
    try:
        import mlx.core  # noqa: F401
    except ImportError as exc:
        raise no_mlx(exc) from exc


def no_mlx(reason: ImportError) -> BadInputError:
    """Why ``mlx.core`` does not import, and what to do about it on this system."""
    # Asked of `platform`: a type checker takes a comparison with sys.platform for settled.
    system, processor = platform.system(), platform.machine()
    if system == "Windows" or (system == "Darwin" and processor == "x86_64"):
        return BadInputError(
            f"MLX does not run on {'macOS' if system == 'Darwin' else system} {processor}",
            "It needs a Mac with Apple silicon, or Linux (on Windows: WSL). mlxq inspect works without it.",
        )
    fault = (str(reason).splitlines() or ["it does not import"])[0]
    if system == "Darwin":
        return BadInputError(f"MLX does not load: {fault}", "Install it: pip install --upgrade mlx.")
    return BadInputError(
        f"MLX does not load: {fault}",
        "Install it with a backend: pip install 'mlx[cpu]', or 'mlx[cuda13]' for an NVIDIA GPU.",
    )
