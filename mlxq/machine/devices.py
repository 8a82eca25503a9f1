"""Machines a model may have to fit: the table in ``devices.yaml``, and the machine this runs on."""

from __future__ import annotations

import difflib
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError

_TABLE = Path(__file__).with_name("devices.yaml")
_GB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One machine. ``gpu_share`` is the share of its memory that a model may use; ``bandwidth`` is in
    bytes/s.
    """

    name: str
    label: str
    memory_bytes: int
    gpu_share: float
    bandwidth: float | None

    @property
    def usable_bytes(self) -> int:
        """Bytes that weights, cache and working memory must fit in."""
        return int(self.memory_bytes * self.gpu_share)


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    import yaml

    table: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return table


@lru_cache(maxsize=1)
def devices() -> tuple[Device, ...]:
    """Every device of the table: Macs by chip and memory, EC2 Mac instances, then iPhones and iPads."""
    return (*_macs(), *_instances(), *_handhelds())


def _macs() -> tuple[Device, ...]:
    share = float(_table()["gpu_share"])
    return tuple(
        Device(f"{chip}-{gb}gb", f"{entry['brand']}, {gb} GB", gb * _GB, share, gbs * 1e9)
        for chip, entry in _table()["chips"].items()
        for gb, gbs in entry["memory"].items()
    )


def _instances() -> tuple[Device, ...]:
    macs = {mac.name: mac for mac in _macs()}
    found = []
    for name, entry in _table()["instances"].items():
        mac = macs[f"{entry['chip']}-{entry['memory_gb']}gb"]
        found.append(replace(mac, name=name, label=f"EC2 {name} ({mac.label})"))
    return tuple(found)


def _handhelds() -> tuple[Device, ...]:
    return tuple(
        Device(name, entry["label"], entry["memory_gb"] * _GB, float(entry["share"]), None)
        for name, entry in _table()["handhelds"].items()
    )


def find_device(name: str) -> Device:
    """The device a person means by ``m4-max-64gb``, ``mac-m4.metal``, ``mac-m4`` or ``iphone-8gb``.

    Case, blanks and underscores do not matter. Raises BadInputError where there is none, with the closest
    names, or where a chip is named without its memory.
    """
    asked = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    by_name = {device.name.removesuffix(".metal"): device for device in devices()}
    if found := by_name.get(asked.removesuffix(".metal")):
        return found
    if asked in _table()["chips"]:
        sizes = [f"{asked}-{gb}gb" for gb in _table()["chips"][asked]["memory"]]
        raise BadInputError(f"device {name!r} comes with more than one memory size", f"Say which: {', '.join(sizes)}.")
    close = difflib.get_close_matches(asked, [device.name for device in devices()], n=3, cutoff=0.5)
    if not close:
        raise BadInputError(f"unknown device {name!r}", "Name one such as m4-max-64gb, mac-m4.metal or iphone-8gb.")
    raise BadInputError(f"unknown device {name!r}", f"Closest: {', '.join(close)}.")


def this_machine() -> Device:
    """The machine this runs on.

    On a Mac: its chip and memory, bandwidth from the table where the pair is in it, and the GPU's share as
    set by ``iogpu.wired_limit_mb``, else the table's. Elsewhere: all of its memory, bandwidth unknown.
    """
    if sys.platform == "darwin":
        brand, memory = _sysctl("machdep.cpu.brand_string"), int(_sysctl("hw.memsize") or 0)
        if brand and memory:
            return _this_mac(brand, memory, int(_sysctl("iogpu.wired_limit_mb") or 0))
    import psutil

    memory = int(psutil.virtual_memory().total)
    label = f"this machine ({platform.system()} {platform.machine()})"
    return Device(
        "this machine", label, memory, float(_table()["gpu_share"]) if sys.platform == "darwin" else 1.0, None
    )


def _this_mac(brand: str, memory: int, wired_limit_mb: int) -> Device:
    """The Mac with this CPU brand string and memory; ``wired_limit_mb`` 0 means the system's default."""
    gb = round(memory / _GB)
    chips = {entry["brand"]: entry["memory"] for entry in _table()["chips"].values()}
    gbs = chips.get(brand, {}).get(gb)
    share = wired_limit_mb * (1 << 20) / memory if wired_limit_mb else float(_table()["gpu_share"])
    return Device(
        "this machine",
        f"this machine ({brand}, {gb} GB)",
        memory,
        min(share, 1.0),
        gbs * 1e9 if gbs else None,
    )


def _sysctl(key: str) -> str | None:
    """One value of ``sysctl``, or None where this system has no such key."""
    done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
