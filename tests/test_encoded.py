"""Packing must be MLX's own, bit for bit, at every width."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxq.methods.encoded import Encoded
from mlxq.methods.formats import Format
from mlxq.methods.packing import pack
from mlxq.methods.rtn import round_to_nearest


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_pack_is_mlx_layout(bits: int, group_size: int) -> None:
    weight = mx.random.normal((5, 256), key=mx.random.key(bits))
    words, scales, _ = mx.quantize(weight, group_size=group_size, bits=bits)
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    codes = mx.dequantize(words, scales=ones, biases=zeros, group_size=group_size, bits=bits)
    assert mx.array_equal(pack(codes.astype(mx.uint8), bits), words)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_pack_keeps_leading_axes(bits: int) -> None:
    codes = mx.random.randint(0, 2**bits, (2, 3, 64), key=mx.random.key(1)).astype(mx.uint8)
    words = pack(codes, bits)
    assert words.shape == (2, 3, 64 * bits // 32)
    assert mx.array_equal(words[1, 2], pack(codes[1, 2:3], bits)[0])


@pytest.mark.parametrize("fmt", [Format(4, 64), Format(4, 32, "mxfp4"), Format(4, 16, "nvfp4"), Format(8, 32, "mxfp8")])
def test_decode_agrees_with_mlx(fmt: Format) -> None:
    weight = mx.random.normal((4, 128), key=mx.random.key(2))
    encoded = round_to_nearest(weight, fmt)
    expected = mx.dequantize(
        encoded.weight,
        scales=encoded.scales,
        biases=encoded.biases,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
    )
    assert mx.allclose(fmt.decode(encoded.arrays()), expected.astype(mx.float32), atol=1e-6)


def test_arrays_have_no_biases_where_the_mode_has_none() -> None:
    weight = mx.ones((1, 32))
    assert set(round_to_nearest(weight, Format(4, 32, "mxfp4")).arrays()) == {"weight", "scales"}
    assert set(Encoded(weight, weight, weight).arrays()) == {"weight", "scales", "biases"}
