"""How checkpoints pack numbers into words, and what a packed tensor holds; from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxq.methods.formats import HELPER_PARTS, TERNARY_PER_BYTE, TERNARY_SCALE, Format
from mlxq.sources.quantization import mlx_format
from mlxq.tensors import DTYPE_BITS, TensorSpec

# Parts that describe how another tensor of the module is quantized, and hold no parameters of their own.
HELPERS = frozenset(
    [
        *HELPER_PARTS,
        "qzeros",
        "g_idx",
        "weight_scale",
        "weight_scale_inv",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "weight_global_scale",
        "input_scale",
        "input_global_scale",
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
    ]
)


def logical(
    path: str, part: str, spec: TensorSpec, specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
) -> tuple[tuple[int, ...], int, Format | None]:
    """Shape in numbers, bits each number takes, and the MLX format, of a tensor that may hold packed
    words.
    """
    hf = config.get("quantization_config") or {}
    bits = DTYPE_BITS[spec.dtype]
    if part == "weight" and spec.dtype == "U32" and "scales" in specs and config.get("quantization"):
        fmt = mlx_format(path, config["quantization"])
        return (*spec.shape[:-1], fmt.logical_columns(spec.shape[-1])), fmt.bits, fmt
    if part == "qweight":
        packed = _bits(hf.get("bits"), bits)
        rows, columns = spec.rows, spec.shape[-1] if spec.shape else 1
        factor = bits // packed
        # AWQ packs along the outputs, GPTQ along the inputs; both store (in, out).
        is_awq = hf.get("quant_method") == "awq"
        return ((columns * factor, rows) if is_awq else (columns, rows * factor)), packed, None
    if part == "weight_packed" and spec.shape:
        packed = _compressed_bits(hf, bits)
        return (*spec.shape[:-1], spec.shape[-1] * bits // packed), packed, None
    if part.endswith("_blocks") and len(spec.shape) >= 2:
        # MXFP4: two numbers a byte, blocks on the last two axes.
        return (*spec.shape[:-2], spec.shape[-2] * spec.shape[-1] * 2), 4, None
    if part == "weight" and spec.dtype == "U8" and TERNARY_SCALE in specs:
        return (spec.shape[0] * TERNARY_PER_BYTE, *spec.shape[1:]), bits // TERNARY_PER_BYTE, None
    if part == "weight" and spec.dtype == "U8" and hf.get("quant_method") == "bitsandbytes":
        return (spec.size * 2,), 4, None
    return spec.shape, bits, None


def _bits(stated: object, word_bits: int) -> int:
    """Bits of a number in words of ``word_bits``; 4, as most have, where what is stated is no such number."""
    return stated if isinstance(stated, int) and 0 < stated <= word_bits else 4


def _compressed_bits(hf: Mapping[str, Any], word_bits: int) -> int:
    """Bits of compressed-tensors weights: those of its first group."""
    groups = hf.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            return _bits(group["weights"].get("num_bits"), word_bits)
    return 4
