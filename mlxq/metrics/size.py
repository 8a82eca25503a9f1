"""What a folder really holds: bytes and bits per weight, counted from the files and never from a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.errors import MlxqError
from mlxq.headers import read_file_header, read_json
from mlxq.methods.formats import PARTS, TERNARY_PER_BYTE, TERNARY_SCALE, Format
from mlxq.tensors import TensorSpec


@dataclass(frozen=True)
class Size:
    """``size_bytes`` of the weight files; ``weight_bytes`` of their tensors; logical ``parameter_count``.

    ``bits_per_weight`` is tensor bits over logical parameters. ``module_bits`` maps each quantized module to the
    bits its packed weight really has.
    """

    size_bytes: int
    weight_bytes: int
    parameter_count: int
    bits_per_weight: float
    module_bits: Mapping[str, int]


def measure_size(folder: Path) -> Size:
    """Count a model folder. Raises MlxqError where a packed weight is not what ``config.json`` says it is."""
    files = sorted(folder.glob("model*.safetensors"))
    tensors: dict[str, TensorSpec] = {t.spec.name: t.spec for file in files for t in read_file_header(file)}
    quantization: Mapping[str, Any] = read_json(folder / "config.json").get("quantization") or {}
    parameters, module_bits = 0, {}
    for name, spec in tensors.items():
        module, _, part = name.rpartition(".")
        scales = tensors.get(f"{module}.scales")
        if f"{module}.{TERNARY_SCALE}" in tensors and part in ("weight", TERNARY_SCALE):
            parameters += spec.size * TERNARY_PER_BYTE if part == "weight" else 0
        elif scales is None or part not in PARTS:
            parameters += spec.size
        elif part == "weight":
            bits, columns = _logical(module, spec, scales, quantization)
            module_bits[module] = bits
            parameters += math.prod(spec.shape[:-1]) * columns
    weight_bytes = sum(spec.nbytes for spec in tensors.values())
    return Size(
        size_bytes=sum(file.stat().st_size for file in files),
        weight_bytes=weight_bytes,
        parameter_count=parameters,
        bits_per_weight=weight_bytes * 8 / max(parameters, 1),
        module_bits=module_bits,
    )


def _logical(module: str, packed: TensorSpec, scales: TensorSpec, quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and columns of a packed weight, from its shapes, checked against what the config records."""
    fmt = Format.from_config(quantization.get(module, quantization))
    columns = scales.shape[-1] * fmt.group_size
    if packed.shape[-1] * 32 != columns * fmt.bits:
        held = packed.shape[-1] * 32 / columns
        raise MlxqError(
            f"{module}: config.json records {fmt.bits} bits, group size {fmt.group_size}, "
            f"and the file holds {held:g} bits",
            "The folder is wrong; write it again.",
        )
    return fmt.bits, columns
