"""The device table and the machine this runs on."""

from __future__ import annotations

import sys

import pytest

from mlxq.errors import BadInputError
from mlxq.machine.devices import Device, _this_mac, devices, find_device, this_machine

GB = 1 << 30


def test_names_are_unique_and_figures_possible() -> None:
    table = devices()
    assert len({device.name for device in table}) == len(table)
    for device in table:
        assert GB <= device.memory_bytes <= 1024 * GB
        assert 0 < device.usable_bytes < device.memory_bytes
        assert device.bandwidth is None or 50e9 <= device.bandwidth <= 2000e9


def test_every_chip_generation_is_there() -> None:
    names = {device.name for device in devices()}
    for generation in range(1, 6):
        for kind in ("", "-pro", "-max"):
            assert any(name.startswith(f"m{generation}{kind}-") for name in names)


@pytest.mark.parametrize(
    ("asked", "name", "gb", "gbs"),
    [
        ("m4-max-64gb", "m4-max-64gb", 64, 546),
        ("M4 Max 36GB", "m4-max-36gb", 36, 410),
        ("m3_ultra_512gb", "m3-ultra-512gb", 512, 819),
        ("mac-m4.metal", "mac-m4.metal", 24, 120),
        ("mac-m4", "mac-m4.metal", 24, 120),
        ("mac2-m1ultra", "mac2-m1ultra.metal", 128, 800),
    ],
)
def test_find_by_the_names_people_type(asked: str, name: str, gb: int, gbs: float) -> None:
    found = find_device(asked)
    assert (found.name, found.memory_bytes, found.bandwidth) == (name, gb * GB, gbs * 1e9)
    assert found.usable_bytes == gb * GB * 3 // 4


def test_a_phone_grants_an_app_less() -> None:
    phone = find_device("iphone-8gb")
    assert (phone.usable_bytes, phone.bandwidth) == (4 * GB, None)


def test_unknown_names_get_the_closest() -> None:
    with pytest.raises(BadInputError, match="unknown device 'm4-max-65gb'") as caught:
        find_device("m4-max-65gb")
    assert "m4-max-64gb" in str(caught.value.hint)


def test_nothing_close_gets_an_example() -> None:
    with pytest.raises(BadInputError) as caught:
        find_device("????")
    assert "m4-max-64gb" in str(caught.value.hint)


def test_a_chip_alone_asks_for_its_memory() -> None:
    with pytest.raises(BadInputError, match="memory size") as caught:
        find_device("m4-pro")
    assert caught.value.hint == "Say which: m4-pro-24gb, m4-pro-48gb, m4-pro-64gb."


def test_a_mac_is_found_in_the_table() -> None:
    mac = _this_mac("Apple M4 Max", 64 * GB, wired_limit_mb=0)
    assert (mac.bandwidth, mac.usable_bytes) == (546e9, 48 * GB)


def test_a_raised_gpu_limit_is_honoured() -> None:
    assert _this_mac("Apple M4 Max", 64 * GB, wired_limit_mb=57344).usable_bytes == 56 * GB


def test_a_mac_newer_than_the_table_has_no_bandwidth() -> None:
    mac = _this_mac("Apple M9 Max", 64 * GB, wired_limit_mb=0)
    assert (mac.bandwidth, mac.usable_bytes) == (None, 48 * GB)


def test_this_machine() -> None:
    import psutil

    here = this_machine()
    assert isinstance(here, Device)
    assert here.memory_bytes == pytest.approx(psutil.virtual_memory().total)
    if sys.platform == "linux":
        assert (here.usable_bytes, here.bandwidth) == (here.memory_bytes, None)
