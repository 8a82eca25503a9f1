"""Where what is kept between runs lies."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$MLXQ_CACHE``, else ``mlxq`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``)."""
    if own := os.environ.get("MLXQ_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "mlxq"
