"""The quantized formats MLX stores, and what each costs in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from mlxq.tensors import TensorSpec

# mode -> (bits allowed, group sizes allowed), first of each is MLX's default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}

# BitNet packs four ternary weights to a byte, along the outputs; the byte's tensor has one scale beside it.
TERNARY_PER_BYTE = 4
TERNARY_SCALE = "weight_scale"


# How the numbers of a format are chosen: rounded, refitted, with error feedback, or whichever suits the module.
METHODS: tuple[str, ...] = ("rtn", "fit", "gptq", "auto")


@dataclass(frozen=True)
class Format:
    """A quantized storage format: ``bits`` per weight, one scale per ``group_size`` weights of a row."""

    bits: int
    group_size: int
    mode: str = "affine"

    @property
    def bits_per_weight(self) -> float:
        """Bits each weight takes with its share of scales (and biases, for 16-bit affine)."""
        overhead = 32 if self.mode == "affine" else 8
        return self.bits + overhead / self.group_size

    def __str__(self) -> str:
        if self.mode == "affine":
            return f"{self.bits}:{self.group_size}"
        return self.mode

    def as_config(self) -> dict[str, int | str]:
        """The entry ``config.json`` holds for a module in this format."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def fault_of(mode: str, bits: int, group_size: int) -> str | None:
    """Say what is wrong with a combination, or None where MLX supports it."""
    if mode not in MODES:
        return f"unknown mode {mode!r}; MLX has {', '.join(MODES)}"
    all_bits, groups = MODES[mode]
    if bits not in all_bits:
        return f"mode {mode} has no {bits}-bit format; it has {', '.join(map(str, sorted(all_bits)))}"
    if group_size not in groups:
        return f"mode {mode} has no group size {group_size}; it has {', '.join(map(str, sorted(groups)))}"
    return None


def layout(weight: TensorSpec, fmt: Format) -> tuple[TensorSpec, ...]:
    """The tensors that store ``weight`` (..., columns) in ``fmt``.

    Packed ``weight`` (..., columns * bits / 32) U32, ``scales`` (..., columns / group_size) and, for affine,
    ``biases`` of the same shape. ``columns`` must be a multiple of the group size.
    """
    module = weight.name.removesuffix(".weight")
    *lead, columns = weight.shape
    if columns % fmt.group_size:
        raise ValueError(f"{weight.name}: {columns} columns are not a multiple of {fmt.group_size}")
    packed = TensorSpec(weight.name, "U32", (*lead, columns * fmt.bits // 32))
    groups = (*lead, columns // fmt.group_size)
    if fmt.mode == "affine":
        return (
            packed,
            TensorSpec(f"{module}.scales", weight.dtype, groups),
            TensorSpec(f"{module}.biases", weight.dtype, groups),
        )
    return packed, TensorSpec(f"{module}.scales", "U8", groups)


def fallback(columns: int, fmt: Format) -> Format | None:
    """``fmt`` with the largest group size up to its own that divides ``columns``, or None where none does."""
    for group_size in sorted(MODES[fmt.mode][1], reverse=True):
        if group_size <= fmt.group_size and columns % group_size == 0:
            return Format(bits=fmt.bits, group_size=group_size, mode=fmt.mode)
    return None
