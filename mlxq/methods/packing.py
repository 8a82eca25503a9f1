"""Integer codes packed into the words that MLX stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack ``codes`` (..., columns), each below ``2**bits``, into (..., columns * bits / 32) uint32.

    MLX's layout is one little-endian stream of bits: eight codes fill ``bits`` bytes, the first code lowest.
    ``columns`` must be a multiple of 32.
    """
    import mlx.core as mx

    *lead, columns = codes.shape
    octets = codes.reshape(-1, 8)
    # Halves of four codes stay within 32 bits for every width up to 8.
    low, high = _joined(octets[:, :4], bits), _joined(octets[:, 4:], bits)
    if bits == 8:
        return mx.stack([low, high], axis=-1).reshape(*lead, columns // 4)
    if bits % 2 == 0 and bits != 6:
        words = low | (high << (4 * bits))
        narrow = words.astype(mx.uint16 if bits == 2 else mx.uint32)
        return narrow.reshape(*lead, -1).view(mx.uint32)
    words64 = low.astype(mx.uint64) | (high.astype(mx.uint64) << mx.array(4 * bits, mx.uint64))
    return words64.view(mx.uint8).reshape(-1, 8)[:, :bits].reshape(*lead, -1).view(mx.uint32)


def _joined(quads: mx.array, bits: int) -> mx.array:
    """Four codes (n, 4) side by side in one uint32 (n,), the first lowest."""
    import mlx.core as mx

    wide = quads.astype(mx.uint32)
    return wide[:, 0] | (wide[:, 1] << bits) | (wide[:, 2] << 2 * bits) | (wide[:, 3] << 3 * bits)
