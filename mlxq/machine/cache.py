"""Where what is kept between runs lies."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def cache_folder() -> Path:
    """``$MLXQ_CACHE``, else ``mlxq`` in the user's cache folder (``$XDG_CACHE_HOME``, ``~/.cache``).

    Raises FileNotFoundError where the user has no home.
    """
    if own := os.environ.get("MLXQ_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "mlxq"
    try:
        return Path("~/.cache").expanduser() / "mlxq"
    except RuntimeError as exc:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder; MLXQ_CACHE can name another", "~") from exc
