"""Decisions -> the tensors, shards and ``config.json`` that are written, to the byte."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlxq.architecture.bind import Architecture
from mlxq.headers import encode_header
from mlxq.methods.formats import PARTS, TERNARY_PER_BYTE
from mlxq.planning.plan import By, Decision, Shard, Step, Stored
from mlxq.recipe.model import Recipe
from mlxq.tensors import TensorSpec

# mlx_lm starts a new shard where one would pass 5 GiB.
SHARD_BYTES = 5 << 30


def steps_of(
    architecture: Architecture, decisions: Mapping[str, Decision], written: Mapping[str, TensorSpec], stored: Stored
) -> tuple[Step, ...]:
    """What is read, encoded and written for each parameter, in the model's order.

    ``written`` has each parameter, by path, as it is written where it is not quantized.
    """
    quantized = {m.path for m in architecture.modules if m.stored}
    steps = []
    for parameter in architecture.parameters:
        name = parameter.spec.name
        module, _, part = name.rpartition(".")
        decision = decisions.get(module)
        opened = stored.opened and module in quantized and part in PARTS
        if opened and part != "weight":
            continue
        if decision is None or part != "weight" or (module in quantized and not opened):
            steps.append(Step(name, written[name], parameter.source, None, False, False, (written[name],)))
            continue
        spec = TensorSpec(name, decision.dtype, decision.shape if opened else parameter.spec.shape)
        steps.append(
            Step(
                path=name,
                spec=spec,
                source=None if opened else parameter.source,
                format=decision.format,
                dequantize=opened,
                repacked=stored is Stored.CARRY_OVER and decision.format is not None,
                outputs=decision.format.layout(spec) if decision.format else (spec,),
                method=decision.method,
                guided=decision.guided,
            )
        )
    return tuple(steps)


def shards_of(steps: tuple[Step, ...]) -> tuple[Shard, ...]:
    """The weight files: each one's header, and where every tensor's bytes go."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for step in steps:
        nbytes = sum(spec.nbytes for spec in step.outputs)
        if groups[-1] and filled + nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].extend(step.outputs)
        filled += nbytes
    shards = []
    for number, specs in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Widest dtype first keeps every tensor aligned to its own item size for readers that map the file.
        ordered = sorted(specs, key=lambda spec: -(spec.nbytes // max(spec.size, 1)))
        header = encode_header(ordered, {"format": "mlx"})
        offsets, offset = {}, len(header)
        for spec in ordered:
            offsets[spec.name] = offset
            offset += spec.nbytes
        shards.append(Shard(name, header, offsets, offset))
    return tuple(shards)


def config_of(architecture: Architecture, recipe: Recipe, decisions: tuple[Decision, ...]) -> dict[str, Any]:
    """``config.json`` as written: every deviation from the top-level format in full, ``false`` for what is kept."""
    config = dict(architecture.config)
    if recipe.dtype:
        for key in ("torch_dtype", "dtype"):
            if key in config:
                config[key] = recipe.dtype
    formats = Counter(d.format for d in decisions if d.format)
    if not formats:
        return config
    default = recipe.default if recipe.default in formats else formats.most_common(1)[0][0]
    assert default is not None
    kept = {d.path: d.format for d in decisions if d.by is By.SOURCE and d.format}
    quantization: dict[str, Any] = dict(default.as_config())
    for decision in decisions:
        if decision.format is None:
            quantization[decision.path] = False
        elif decision.format != default:
            quantization[decision.path] = decision.format.as_config()
    for parameter in architecture.parameters:
        module, _, part = parameter.spec.name.rpartition(".")
        if module in kept and part == kept[module].kind.tensor_scale:
            quantization[module] = {**kept[module].as_config(), part: True}
    config["quantization"] = quantization
    config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def count_parameters(architecture: Architecture) -> int:
    """Logical parameters: a quantized weight counts its numbers, not its words, and its scales not at all."""
    stored = {m.path: m for m in architecture.modules if m.stored}
    ternary = {m.path for m in architecture.modules if m.kind == "BitLinear"}
    count = 0
    for parameter in architecture.parameters:
        module, _, part = parameter.spec.name.rpartition(".")
        if module in stored and part in PARTS:
            count += math.prod(stored[module].shape) if part == "weight" else 0
        elif module in ternary:
            count += parameter.spec.size * TERNARY_PER_BYTE if part == "weight" else 0
        else:
            count += parameter.spec.size
    return count


def config_text(config: Mapping[str, Any]) -> str:
    """``config.json`` as text, non-finite floats tagged the way ``transformers`` and ``mlx_lm`` expect."""
    return json.dumps(_tagged(config), indent=4) + "\n"


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return {"__float__": "NaN"}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: _tagged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(inner) for inner in value]
    return value
