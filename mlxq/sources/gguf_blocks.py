"""GGML's quantized blocks: which of them MLX affine holds exactly, how to repack those, what is nearest to others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlxq.errors import MlxqError
from mlxq.methods.formats import AFFINE, MODES, Format

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[Any]

GROUP = 32

# Block types that are 32 unsigned integers with a scale and an offset, which is what MLX affine is.
REPACKABLE: dict[str, Format] = {
    "Q4_0": Format(4, GROUP),
    "Q4_1": Format(4, GROUP),
    "Q5_0": Format(5, GROUP),
    "Q5_1": Format(5, GROUP),
    "Q8_0": Format(8, GROUP),
}
# Block types that MLX has under the same name.
_SAME_MODE = {"MXFP4": MODES["mxfp4"].default, "NVFP4": MODES["nvfp4"].default}
FLOAT_TYPES = ("F32", "F16", "BF16")


def nearest_format(ggml_type: str) -> Format | None:
    """The MLX format nearest to a GGML type, None for float types.

    Types in ``REPACKABLE`` give their exact twin, MXFP4 and NVFP4 the mode of that name. Others keep their whole
    bits per weight (at least 2) and take the group size that comes nearest in total bits per weight.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if ggml_type in FLOAT_TYPES:
        return None
    if ggml_type in REPACKABLE:
        return REPACKABLE[ggml_type]
    if ggml_type in _SAME_MODE:
        return _SAME_MODE[ggml_type]
    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    wanted = 8 * nbytes / weights
    bits = max(b for b in AFFINE.bits if b <= max(wanted, 2))
    formats = (Format(bits, group_size) for group_size in AFFINE.group_sizes)
    return min(formats, key=lambda fmt: abs(fmt.bits_per_weight - wanted))


def repack(blocks: Bytes, ggml_type: str, name: str) -> dict[str, npt.NDArray[Any]]:
    """Stored rows as MLX affine arrays of the same values.

    ``blocks`` is (rows, bytes per row) uint8, each row whole blocks. Returns ``weight`` (rows, columns * bits / 32)
    uint32, ``scales`` and ``biases`` (rows, columns / 32) float16. A zero-point block's offset is a power of two
    times its scale, exact in float16 unless it overflows: then MlxqError names the tensor ``name``.
    Block layouts: ggml's ``ggml-common.h``. MLX packs integers as one little-endian bit stream per row.
    """
    import numpy as np

    rows = blocks.shape[0]
    block_bytes = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}[ggml_type]
    fields = np.ascontiguousarray(blocks).reshape(rows, -1, block_bytes)
    scales = fields[..., :2].copy().view(np.float16)[..., 0]
    if ggml_type in ("Q4_1", "Q5_1"):
        biases = fields[..., 2:4].copy().view(np.float16)[..., 0]
        body = fields[..., 4:]
    else:
        zero = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}[ggml_type]
        with np.errstate(over="ignore", invalid="ignore"):
            biases = (scales.astype(np.float32) * -zero).astype(np.float16)
        body = fields[..., 2:]
    if not np.isfinite(scales).all() or (ggml_type in ("Q4_1", "Q5_1") and not np.isfinite(biases).all()):
        raise MlxqError(
            f"{name}: a {ggml_type} block has a scale that is NaN or infinite",
            "The source is damaged: fetch or convert it again. mlxq inspect --check lists all such tensors.",
        )
    if not np.isfinite(biases).all():
        raise MlxqError(
            f"{name}: a {ggml_type} block has a scale too large for MLX's float16 offsets",
            "Quantize the file anew instead of keeping its blocks.",
        )
    fmt = REPACKABLE[ggml_type]
    values = {4: _nibbles, 5: _five_bits, 8: _bytes}[fmt.bits](body)
    packed = _pack(values.reshape(rows, -1), fmt.bits)
    return dict(zip(fmt.kind.parts, (packed, scales, biases), strict=True))


def _nibbles(body: Bytes) -> Bytes:
    """(..., 16) bytes -> (..., 32) values: low halves first, then high halves."""
    import numpy as np

    return np.concatenate([body & 0x0F, body >> 4], axis=-1)


def _five_bits(body: Bytes) -> Bytes:
    """(..., 4 + 16) bytes -> (..., 32) values: fifth bits of all, then nibbles."""
    import numpy as np

    fifth = np.unpackbits(body[..., :4], axis=-1, bitorder="little")
    values: Bytes = _nibbles(body[..., 4:]) | (fifth << 4)
    return values


def _bytes(body: Bytes) -> Bytes:
    """(..., 32) signed bytes -> values with the zero point at 128."""
    values: Bytes = body ^ 0x80
    return values


def _pack(values: Bytes, bits: int) -> npt.NDArray[Any]:
    import numpy as np

    if bits == 8:
        stream = np.ascontiguousarray(values)
    elif bits == 4:
        stream = values[:, 0::2] | (values[:, 1::2] << 4)
    else:
        eights = values.reshape(values.shape[0], -1, 8).astype("<u8")
        joined = np.zeros(eights.shape[:2], dtype="<u8")
        for place in range(8):
            joined |= eights[..., place] << np.uint64(bits * place)
        stream = joined.view(np.uint8).reshape(*eights.shape)[..., :bits].reshape(values.shape[0], -1)
    return np.ascontiguousarray(stream).view(np.uint32)
