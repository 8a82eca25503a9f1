"""mlxq: convert and quantize language models for Apple's MLX.

The verbs are functions: ``inspect``, ``plan``, ``quantize``, ``convert``, ``compare`` and ``upload`` (docs/python.md).
Nothing is imported until one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mlxq.api import Inspected
    from mlxq.comparison.result import Comparison
    from mlxq.errors import BadInputError, GateError, MlxqError, RecipeError
    from mlxq.pipeline import Finished
    from mlxq.planning.plan import Plan
    from mlxq.publish.publish import Published
    from mlxq.recipe.model import Recipe
    from mlxq.recipe.target import Target
    from mlxq.verbs import compare, convert, inspect, plan, quantize, upload

# Where what a name stands for is defined.
_HOMES = {
    "BadInputError": "mlxq.errors",
    "Comparison": "mlxq.comparison.result",
    "Finished": "mlxq.pipeline",
    "GateError": "mlxq.errors",
    "Inspected": "mlxq.api",
    "MlxqError": "mlxq.errors",
    "Plan": "mlxq.planning.plan",
    "Published": "mlxq.publish.publish",
    "Recipe": "mlxq.recipe.model",
    "RecipeError": "mlxq.errors",
    "Target": "mlxq.recipe.target",
    "compare": "mlxq.verbs",
    "convert": "mlxq.verbs",
    "inspect": "mlxq.verbs",
    "plan": "mlxq.verbs",
    "quantize": "mlxq.verbs",
    "upload": "mlxq.verbs",
}

__all__ = [
    "BadInputError",
    "Comparison",
    "Finished",
    "GateError",
    "Inspected",
    "MlxqError",
    "Plan",
    "Published",
    "Recipe",
    "RecipeError",
    "Target",
    "compare",
    "convert",
    "inspect",
    "plan",
    "quantize",
    "upload",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxq' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
