"""Does what a model takes fit what a machine has."""

from __future__ import annotations

from dataclasses import dataclass

from mlxq.machine.devices import Device

# Python, MLX and Metal with their kernels and buffers, before any weight.
BASE_OVERHEAD_BYTES = 300_000_000


@dataclass(frozen=True)
class Footprint:
    """What running a model takes, in bytes.

    ``read_bytes`` is what each decoded token reads of the weights: all of them, or fewer where a token passes
    through some experts only. ``activation_bytes`` is the working memory of reading a prompt.
    """

    weight_bytes: int
    read_bytes: int
    kv_cache_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a device, and the most tokens/sec its memory allows when decoding. Sizes in
    bytes.
    """

    weight_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    needed_bytes: int
    usable_bytes: int
    fits: bool
    decode_tps_ceiling: float | None


def fit(footprint: Footprint, device: Device) -> Fit:
    """Does a model with this footprint run on ``device``?

    ``decode_tps_ceiling`` = bandwidth / (bytes read per token + the cache): the most that memory allows, never
    reached; None where the bandwidth is not known.
    """
    overhead = BASE_OVERHEAD_BYTES + footprint.activation_bytes
    needed = footprint.weight_bytes + footprint.kv_cache_bytes + overhead
    read = footprint.read_bytes + footprint.kv_cache_bytes
    ceiling = device.bandwidth / read if device.bandwidth and read else None
    usable = device.usable_bytes
    return Fit(footprint.weight_bytes, footprint.kv_cache_bytes, overhead, needed, usable, needed <= usable, ceiling)


def weight_room(device: Device, *, kv_cache_bytes: int, activation_bytes: int) -> int:
    """The most bytes of weights with which a model still fits ``device``; negative where none do."""
    return device.usable_bytes - kv_cache_bytes - BASE_OVERHEAD_BYTES - activation_bytes
