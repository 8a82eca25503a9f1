"""How a model says that it is quantized already, and whether that is so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.headers import read_json
from mlxq.methods.formats import Format

# What other tools say of their quantizations that a person would want to know.
_TOLD = (
    "bits",
    "group_size",
    "fmt",
    "format",
    "weight_block_size",
    "desc_act",
    "bnb_4bit_quant_type",
    "quant_algo",
)


@dataclass(frozen=True)
class Quantization:
    """How a source is quantized already: ``method`` (``mlx``, ``gguf``, ``fp8``, ``awq``, ...) and its details."""

    method: str
    detail: str


def believed(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, Any]:
    """``config`` without what it says of a quantization that the tensors do not have.

    A fused or dequantized model may keep a ``quantization`` key over plain weights, or a ``quantization_config``
    that names no method; what is stored decides.
    """
    stale = set()
    packed = any(name.endswith(".scales") for name in tensors)
    other = config.get("quantization_config")
    named = isinstance(other, Mapping) and bool(other.get("quant_method"))
    if config.get("quantization") is not None and not packed:
        stale.add("quantization")
    # Beside a quantization of MLX's own it is the same dict again.
    if not named and (config.get("quantization") is None or not packed):
        stale.add("quantization_config")
    return {key: value for key, value in config.items() if key not in stale}


def stated_quantization(config: Mapping[str, Any], folder: Path) -> Quantization | None:
    """How a folder of safetensors says that it is quantized, or None. ``config`` is what is ``believed`` of it."""
    mlx, other = config.get("quantization"), config.get("quantization_config")
    if other is None and (folder / "hf_quant_config.json").exists():
        # NVIDIA ModelOpt says it in a file of its own.
        settings = read_json(folder / "hf_quant_config.json").get("quantization", {})
        other = {"quant_method": "modelopt", **(settings if isinstance(settings, Mapping) else {})}
    if isinstance(mlx, Mapping):
        top = mlx_format("", mlx)
        others = sum(isinstance(value, Mapping) for value in mlx.values())
        detail = f"{top.mode}, {top.bits} bits, group size {top.group_size}"
        return Quantization("mlx", detail + (f"; {others} modules differ" if others else ""))
    if isinstance(other, Mapping) and other.get("quant_method"):
        detail = ", ".join(f"{key} {other[key]}" for key in _TOLD if other.get(key) is not None)
        return Quantization(str(other["quant_method"]), detail)
    return None


def mlx_format(path: str, quantization: Mapping[str, Any]) -> Format:
    """The format of a module by a config's ``quantization``; its mode's defaults where it leaves something open."""
    own = quantization.get(path)
    entry = own if isinstance(own, Mapping) else quantization
    return Format.from_config({"mode": quantization.get("mode"), **entry})
