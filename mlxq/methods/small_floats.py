"""The small floats of microscaling modes, for numbers and for scales (OCP Microscaling Formats specification v1.0)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

# Midpoints between the magnitudes of E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6) by code; the sign is the code's bit 3.
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E4M3_LARGEST = 448.0


@dataclass(frozen=True)
class ScaleCodes:
    """Scales stored as uint8 codes of a small float.

    ``values`` gives the float32 values of codes. ``largest`` is the code of the largest finite scale. ``neighbours``
    are the steps of code, down and up, that reach every scale a fit has reason to try.
    """

    values: Callable[[mx.array], mx.array]
    largest: int
    neighbours: tuple[int, ...]


def nearest_e2m1(numbers: mx.array) -> mx.array:
    """The uint8 code of the E2M1 value nearest to each number; ties go toward zero."""
    import mlx.core as mx

    size = mx.abs(numbers)
    codes = 8 * (numbers < 0).astype(mx.uint8)
    for middle in _E2M1_MIDPOINTS:
        codes = codes + (size > middle).astype(mx.uint8)
    return codes


def nearest_e4m3(numbers: mx.array) -> mx.array:
    """The uint8 code of the E4M3 value nearest to each number."""
    import mlx.core as mx

    return mx.to_fp8(mx.clip(numbers, -_E4M3_LARGEST, _E4M3_LARGEST))


def _e8m0_values(codes: mx.array) -> mx.array:
    import mlx.core as mx

    return mx.power(2.0, codes.astype(mx.float32) - 127)


def _e4m3_values(codes: mx.array) -> mx.array:
    import mlx.core as mx

    return mx.from_fp8(codes, dtype=mx.float32)


# Powers of two: codes are a factor 2 apart, and 255 is NaN.
E8M0 = ScaleCodes(_e8m0_values, largest=254, neighbours=(-1, 1))
# Codes are 6 to 12% apart, and 127 is NaN; scales have no sign.
E4M3 = ScaleCodes(_e4m3_values, largest=126, neighbours=(-4, -3, -2, -1, 1, 2, 3))
