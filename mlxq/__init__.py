"""mlxq: convert and quantize language models for Apple's MLX.

The verbs are functions: ``inspect``, ``plan``, ``quantize``, ``convert``, ``compare`` and ``upload`` (docs/python.md).
Nothing is imported until one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlxq.api import compare, convert, inspect, plan, quantize, upload
    from mlxq.errors import BadInputError, GateError, MlxqError, RecipeError

__all__ = [
    "BadInputError",
    "GateError",
    "MlxqError",
    "RecipeError",
    "compare",
    "convert",
    "inspect",
    "plan",
    "quantize",
    "upload",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mlxq' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("mlxq.errors" if name.endswith("Error") else "mlxq.api"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
