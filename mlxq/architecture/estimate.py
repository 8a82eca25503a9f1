"""What a recipe would write of an inspected model, and what running it takes, without asking MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.architecture.config import active_share, declared_dtype
from mlxq.architecture.inspection import InspectedModule, Inspection
from mlxq.architecture.kv_cache import activation_bytes, kv_cache_bytes
from mlxq.machine.memory import Footprint
from mlxq.methods.formats import Format
from mlxq.recipe.match import assign
from mlxq.tensors import DTYPE_BY_NAME, FLOAT_DTYPES, TensorSpec

if TYPE_CHECKING:
    from mlxq.recipe.model import Recipe


@dataclass(frozen=True)
class Estimate:
    """Bytes of the weights as a recipe would write them, and how many of them each decoded token reads."""

    weight_bytes: int
    read_bytes: int

    def footprint(self, config: Mapping[str, Any], context: int) -> Footprint:
        """What running the model takes with ``context`` tokens."""
        cache, activations = kv_cache_bytes(config, context), activation_bytes(config, context)
        return Footprint(self.weight_bytes, self.read_bytes, cache, activations)


def estimate(inspection: Inspection, recipe: Recipe) -> Estimate:
    """Predict what ``recipe`` would write, from headers alone and without asking MLX what the model is.

    Exact where the checkpoint's names and shapes are those of the MLX model, else near: which modules can be
    quantized is guessed from names, and what the model itself asks for (a router at 8 bits) is not known.
    Rules that match nothing are passed over.
    """
    modules = [module for module in inspection.modules if module.kept]
    quantizable = [module for module in modules if module.quantizable]
    paths = [module.path for module in quantizable]
    decided, _ = assign(recipe.rules, paths, inspection.layer_count, inspection.tied_head)
    wanted: dict[str, Format | None] = {
        match.path: recipe.default if match.rule is None else recipe.rules[match.rule].format for match in decided
    }
    declared = recipe.dtype or declared_dtype(inspection.config)
    share = active_share(inspection.config)
    total = read = 0
    for module in modules:
        nbytes = _written_bytes(module, wanted.get(module.path), declared)
        total += nbytes
        if module.expert:
            read += round(nbytes * share)
        elif module.path != inspection.embedding or inspection.tied_embeddings:
            # Of an embedding that is not also the head, a token reads one row.
            read += nbytes
    return Estimate(total, read)


def _written_bytes(module: InspectedModule, wanted: Format | None, dtype: str | None) -> int:
    """Bytes of one module in ``wanted``, or in ``dtype`` where that is None or does not fit its width."""
    held = module.dtype if module.dtype in FLOAT_DTYPES else "BF16"
    if not module.castable:
        return module.parameters * module.stored_bits // 8
    weight = TensorSpec(f"{module.path}.weight", DTYPE_BY_NAME[dtype] if dtype else held, module.shape)
    fitting = wanted.fitted_to(module.shape[-1]) if wanted else None
    return sum(spec.nbytes for spec in fitting.layout(weight)) if fitting else weight.nbytes
