"""Shared objects for tests of what a BLAS may do, made without a compiler: whole, of a few bytes of machine code, or a
copy of a real library with one symbol changed.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

# What a routine does at once: an instruction that no processor has, a jump to itself, and nothing.
_CODE = {
    "x86_64": (62, {"crash": b"\x0f\x0b", "hang": b"\xeb\xfe", "nothing": b"\xc3"}),
    "aarch64": (183, {"crash": b"\0\0\0\0", "hang": b"\0\0\0\x14", "nothing": b"\xc0\x03\x5f\xd6"}),
}
SUPPORTED = platform.machine() in _CODE
_PAGE = 0x10000  # the largest that either processor uses


def write_library(path: Path, routines: Sequence[str], what_they_do: str) -> Path:
    """A shared object whose ``routines`` all ``crash``, ``hang``, or do ``nothing``."""
    machine, codes = _CODE[platform.machine()]
    code = codes[what_they_do]
    text, symbols = b"\0", bytes(24)
    for name in routines:
        symbols += struct.pack("<IBBHQQ", len(text), 0x12, 0, 1, _PAGE, len(code))
        text += name.encode() + b"\0"
    count = len(routines)
    hashes = struct.pack(f"<{count + 4}I", 1, count + 1, count, 0, *range(count))
    hashes += bytes(-len(hashes) % 8)
    dynamic = 64 + 4 * 56
    at_symbols = dynamic + 6 * 16
    at_hashes = at_symbols + len(symbols)
    at_text = at_hashes + len(hashes)
    end = at_text + len(text)
    elf = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    elf += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    elf += struct.pack("<II6Q", 1, 6, 0, 0, 0, end, end, _PAGE)
    elf += struct.pack("<II6Q", 1, 5, _PAGE, _PAGE, _PAGE, len(code), len(code), _PAGE)
    elf += struct.pack("<II6Q", 2, 6, dynamic, dynamic, dynamic, 96, 96, 8)
    elf += struct.pack("<II6Q", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)
    elf += struct.pack("<12Q", 4, at_hashes, 5, at_text, 6, at_symbols, 10, len(text), 11, 24, 0, 0)
    elf += symbols + hashes + text
    path.write_bytes(elf.ljust(_PAGE, b"\0") + code)
    return path


def undefined_symbols(library: Path) -> set[str]:
    """The names that a shared object takes from others."""
    return {name for name, _, section, _ in _symbols(library.read_bytes()) if section == 0}


def defined_symbols(library: Path) -> set[str]:
    """The names that a shared object gives to others."""
    return {name for name, _, section, _ in _symbols(library.read_bytes()) if section != 0}


def processor(library: Path) -> int:
    """The number that stands in a shared object for the processor it is built for: 62 x86-64, 183 arm64."""
    with library.open("rb") as file:
        return int.from_bytes(file.read(20)[18:], "little")


def write_changed(path: Path, library: Path, routine: str, *, now: str) -> Path:
    """A copy of ``library`` in which the name ``routine`` means the routine ``now``."""
    image = bytearray(library.read_bytes())
    found = {name: (at, value) for name, at, section, value in _symbols(bytes(image)) if section != 0}
    struct.pack_into("<Q", image, found[routine][0] + 8, found[now][1])
    path.write_bytes(image)
    return path


def _symbols(image: bytes) -> Iterator[tuple[str, int, int, int]]:
    """Name, offset in the file, section and value of each dynamic symbol."""
    (start,) = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, start + size * at) for at in range(count)]
    for section in sections:
        if section[1] == 11:  # SHT_DYNSYM; its sh_link is the section of its names
            names = sections[section[6]][4]
            for at in range(section[4], section[4] + section[5], 24):
                name, _, _, where, value, _ = struct.unpack_from("<IBBHQQ", image, at)
                if name:  # the first, and those that stand for sections, have none
                    yield image[names + name : image.index(b"\0", names + name)].decode(), at, where, value
