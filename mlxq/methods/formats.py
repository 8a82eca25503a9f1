"""The quantized formats MLX stores, a row a mode: what they hold, what it costs, and the numbers it stands for.

Whatever differs between modes is said here. A new mode is a row of ``MODES``; where its numbers or scales are of a
new type, that type is in ``small_floats``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.methods.packing import pack
from mlxq.methods.small_floats import E4M3, E8M0, ScaleCodes, nearest_e2m1, nearest_e4m3
from mlxq.tensors import TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


@dataclass(frozen=True)
class Mode:
    """A way to store weights in groups that share a scale.

    ``bits`` and ``group_sizes`` are those allowed, MLX's default first. ``beside`` names what each group has beside
    its codes. ``nearest`` gives the codes of numbers in units of the scale; None where codes are unsigned integers
    that ``scale * code + bias`` turns into weights. ``scale_codes`` says what stored scales stand for; None where what
    lies beside the codes is floats of the model's own dtype. ``tensor_scale`` names the one number for a whole tensor
    that may be there too. ``coarsest`` is the widest gap between neighbouring numbers over the largest (E2M1: 2 of 6,
    E4M3: 32 of 448), times how far apart scales are (E8M0: 2, E4M3: 9/8); None where gaps are all the same.
    """

    name: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    beside: tuple[str, ...]
    nearest: Callable[[mx.array], mx.array] | None = None
    scale_codes: ScaleCodes | None = None
    tensor_scale: str | None = None
    coarsest: float | None = None

    @property
    def default(self) -> Format:
        """The format that MLX takes where only the mode is said."""
        return Format(self.bits[0], self.group_sizes[0], self.name)

    @property
    def parts(self) -> tuple[str, ...]:
        """The arrays of a module in this mode by name, packed weight first."""
        return ("weight", *self.beside, *([self.tensor_scale] if self.tensor_scale else []))


AFFINE = Mode("affine", (4, 2, 3, 5, 6, 8), (64, 32, 128), ("scales", "biases"))
MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        AFFINE,
        Mode("mxfp4", (4,), (32,), ("scales",), nearest_e2m1, E8M0, coarsest=2 / 6 * 2),
        Mode(
            "nvfp4", (4,), (16,), ("scales",), nearest_e2m1, E4M3, tensor_scale="global_scale", coarsest=2 / 6 * 9 / 8
        ),
        Mode("mxfp8", (8,), (32,), ("scales",), nearest_e4m3, E8M0, coarsest=32 / 448 * 2),
    )
}

# Every array that any mode stores for a module, and those of them that hold no parameters of their own.
PARTS: tuple[str, ...] = tuple(dict.fromkeys(part for mode in MODES.values() for part in mode.parts))
HELPER_PARTS: tuple[str, ...] = PARTS[1:]

ALL_BITS: tuple[int, ...] = tuple(sorted({bits for mode in MODES.values() for bits in mode.bits}))
ALL_GROUP_SIZES: tuple[int, ...] = tuple(sorted({size for mode in MODES.values() for size in mode.group_sizes}))

# BitNet packs four ternary weights to a byte, along the outputs; the byte's tensor has one scale beside it.
TERNARY_PER_BYTE = 4
TERNARY_SCALE = "weight_scale"


@dataclass(frozen=True)
class Format:
    """A quantized storage format: ``bits`` per weight, one scale per ``group_size`` weights of a row."""

    bits: int
    group_size: int
    mode: str = AFFINE.name

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> Format:
        """The format that an entry of ``config.json`` (or of a model's ``quant_predicate``) means.

        A missing mode is affine; bits and group size that are missing or null (mlx_lm's mixed presets write null)
        are the mode's default. Raises BadInputError for a mode that MLX does not have, and for what is no entry.
        """
        if not isinstance(entry, Mapping):
            raise BadInputError(f"a quantization in config.json is {_short(entry)}, not an object")
        mode = MODES.get(str(entry.get("mode") or AFFINE.name))
        if mode is None:
            raise BadInputError(
                f"unknown quantization mode {_short(entry['mode'])}; known are {', '.join(MODES)}",
                "config.json may be of a newer MLX: try pip install -U mlxq",
            )
        bits = entry.get("bits") or mode.bits[0]
        group_size = entry.get("group_size") or mode.group_sizes[0]
        for name, value, most in (("bits", bits, 32), ("group_size", group_size, 1 << 31)):
            if type(value) is not int or not 0 < value <= most:
                raise BadInputError(f"a quantization in config.json has {name} {_short(value)}")
        return cls(bits, group_size, mode.name)

    @classmethod
    def of_module(cls, module: nn.Module) -> Format | None:
        """The format that an MLX module is stored in, None where it is not quantized."""
        if "scales" not in module:
            return None
        return cls(int(module.bits), int(module.group_size), str(getattr(module, "mode", AFFINE.name)))

    @property
    def kind(self) -> Mode:
        """The row of its mode."""
        return MODES[self.mode]

    @property
    def bits_per_weight(self) -> float:
        """Bits each weight takes with its share of scales and biases, where those are of 16 bits."""
        scale_bits = 8 if self.kind.scale_codes else 16
        return self.bits + scale_bits * len(self.kind.beside) / self.group_size

    def __str__(self) -> str:
        """``4:64``, and the name alone of a mode that has one format."""
        return f"{self.bits}:{self.group_size}" if len(self.kind.bits) > 1 else self.mode

    def in_words(self) -> str:
        """``4 bits, groups of 64``, after the mode where that is not the plain one."""
        mode = "" if self.kind is AFFINE else f"{self.mode}, "
        return f"{mode}{self.bits} bits, groups of {self.group_size}"

    def as_config(self) -> dict[str, int | str]:
        """The entry ``config.json`` holds for a module in this format."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def fitted_to(self, columns: int) -> Format | None:
        """This format with the largest group size up to its own that divides ``columns``, None where none does."""
        for group_size in sorted(self.kind.group_sizes, reverse=True):
            if group_size <= self.group_size and columns % group_size == 0:
                return Format(self.bits, group_size, self.mode)
        return None

    def layout(self, weight: TensorSpec) -> tuple[TensorSpec, ...]:
        """The tensors that store ``weight`` (..., columns).

        Packed ``weight`` (..., columns * bits / 32) U32, then ``scales`` (and ``biases``, where the mode has them)
        (..., columns / group_size), in U8 where scales are codes and else in the weight's dtype.
        Raises ValueError where ``columns`` is no multiple of the group size.
        """
        module = weight.name.removesuffix(".weight")
        *lead, columns = weight.shape
        if columns % self.group_size:
            raise ValueError(f"{weight.name}: {columns} columns are not a multiple of {self.group_size}")
        packed = TensorSpec(weight.name, "U32", (*lead, columns * self.bits // 32))
        groups = (*lead, columns // self.group_size)
        dtype = "U8" if self.kind.scale_codes else weight.dtype
        return packed, *(TensorSpec(f"{module}.{name}", dtype, groups) for name in self.kind.beside)

    def logical_columns(self, packed_columns: int) -> int:
        """Weights in a row of ``packed_columns`` words."""
        return packed_columns * 32 // self.bits

    def pack(self, codes: mx.array) -> mx.array:
        """Codes (..., columns) as the words (..., columns * bits / 32) uint32 that MLX stores."""
        return pack(codes, self.bits)

    def stored_parts(self, module: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Those of a module's arrays that store its weight, by name."""
        return {name: module[name] for name in self.kind.parts if module.get(name) is not None}

    def rows(self, parts: Mapping[str, mx.array], index: Any) -> dict[str, mx.array]:
        """The parts that store the rows at ``index`` of the first axis; a tensor's own scale goes with all of them."""
        return {name: array if name == self.kind.tensor_scale else array[index] for name, array in parts.items()}

    def dequantize(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The weights in ``dtype`` that MLX itself makes of ``parts``, computed in the scales' dtype.

        A scale for each expert of a stack is taken expert by expert: ``mx.dequantize`` takes one at a time.
        """
        import mlx.core as mx

        beside = {name: array for name, array in parts.items() if name != "weight"}
        scale_name = self.kind.tensor_scale
        if scale_name is not None and scale_name in beside and beside[scale_name].size > 1:
            scales = beside.pop(scale_name).reshape(-1)
            by_row = {"weight": parts["weight"], **beside}
            experts = [{name: array[i] for name, array in by_row.items()} for i in range(scales.size)]
            return mx.stack([self.dequantize({**e, scale_name: scales[i]}, dtype) for i, e in enumerate(experts)])
        how: dict[str, Any] = {**beside, **self.as_config(), "dtype": dtype}
        return mx.dequantize(parts["weight"], **how)

    def steps(self, weight: mx.array) -> mx.array:
        """The widest gap between the numbers that each group of ``weight`` (rows, columns) may become: (rows, groups).

        Rounding is off by half of it at most where scales are exact.
        """
        import mlx.core as mx

        groups = weight.reshape(weight.shape[0], -1, self.group_size)
        if self.kind.coarsest is None:
            return mx.divide(groups.max(-1) - groups.min(-1), 2**self.bits - 1)
        return mx.multiply(mx.abs(groups).max(-1), self.kind.coarsest)

    def decode(self, parts: Mapping[str, mx.array]) -> mx.array:
        """The float32 weights that ``parts`` stand for: scales and biases as stored, arithmetic not rounded to them."""
        import mlx.core as mx

        widened = {
            name: array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in parts.items()
        }
        return self.dequantize(widened, mx.float32)


def _short(value: object) -> str:
    """A value of somebody's file as a message can show it."""
    shown = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return shown if len(shown) <= 60 else shown[:60] + " ..."


def fault_of(mode: str, bits: int, group_size: int) -> str | None:
    """Say what is wrong with a combination, or None where MLX supports it."""
    if mode not in MODES:
        return f"unknown mode {mode!r}; MLX has {', '.join(MODES)}"
    row = MODES[mode]
    if bits not in row.bits:
        return f"mode {mode} has no {bits}-bit format; it has {', '.join(map(str, sorted(row.bits)))}"
    if group_size not in row.group_sizes:
        return f"mode {mode} has no group size {group_size}; it has {', '.join(map(str, sorted(row.group_sizes)))}"
    return None
