"""A BLAS library, and its routines under the names that MLX's CPU backend looks for.

The Linux CPU wheel of MLX is linked to a reference BLAS and LAPACK of its own. The dynamic loader asks libraries that
were loaded earlier, and globally, first; so a library that has those names and is loaded before ``mlx.core`` answers in
their place. An OpenBLAS made to live beside others has its names prefixed (``scipy_cblas_sgemm``). Instead of changing
the library, a second one is made in memory that holds nothing but a table of symbols: each of MLX's names, with the
address at which the routine lies in this process.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

# Every routine that libmlx.so takes from BLAS and LAPACK. tests/test_blas.py holds this against the installed one.
MLX_ROUTINES = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"),
    *("spotrf_", "dpotrf_", "strtri_", "dtrtri_", "sgetrf_", "dgetrf_", "sgetri_", "dgetri_"),
    *("sgeqrf_", "dgeqrf_", "sorgqr_", "dorgqr_", "sgesdd_", "dgesdd_", "cgesdd_"),
    *("ssyevd_", "dsyevd_", "cheevd_", "sgeev_", "dgeev_", "cgeev_"),
)
_PREFIXES = ("", "scipy_")


class BlasFault(Exception):
    """Why a library cannot serve MLX. ``lasting`` where that is so for as long as the file itself is the same."""

    def __init__(self, why: str, *, lasting: bool) -> None:
        super().__init__(why)
        self.lasting = lasting


def lend(path: Path) -> str | None:
    """Let the library at ``path`` answer for all of MLX's BLAS and LAPACK, from now until the process ends.

    Must run before ``mlx.core`` is imported. A library that lacks a routine is not lent at all, as MLX would mix two.
    Returns the name of the kernels that an OpenBLAS chose for this CPU, None where the library does not say.

    Raises:
        BlasFault: it does not load, lacks routines, or does not come first.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as exc:
        raise BlasFault(f"does not load: {exc}", lasting=False) from exc
    prefix, missing = min(
        ((prefix, [name for name in MLX_ROUTINES if not hasattr(library, prefix + name)]) for prefix in _PREFIXES),
        key=lambda found: len(found[1]),
    )
    if missing:
        raise BlasFault(f"lacks {_some(missing)}, which MLX needs", lasting=True)
    addresses = {name: _address(library, prefix + name) for name in MLX_ROUTINES}
    with path.open("rb") as file:
        _load_globally(_symbol_table(addresses, file.read(64)))
    everyones = ctypes.CDLL(None)
    others = [name for name, address in addresses.items() if _address(everyones, name) != address]
    if others:
        raise BlasFault(f"is not reached: another library answers for {_some(others)}", lasting=False)
    return _kernel(library, prefix)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more routines" if len(names) > 3 else "")


def _address(library: ctypes.CDLL, name: str) -> int | None:
    routine = getattr(library, name, None)
    return None if routine is None else ctypes.cast(routine, ctypes.c_void_p).value


def _kernel(library: ctypes.CDLL, prefix: str) -> str | None:
    ask = getattr(library, f"{prefix}openblas_get_corename", None)
    if ask is None:
        return None
    ask.restype = ctypes.c_char_p
    name = ask()
    return name.decode("ascii", "replace") if name else None


def _symbol_table(addresses: Mapping[str, int | None], header: bytes) -> bytes:
    """A shared object (ELF, 64 bits) without code or data that defines each name at an absolute address.

    Symbols of section SHN_ABS keep their value wherever the object itself is put (glibc 2.28 and later; the wheels of
    MLX need 2.35). ``header`` is the ELF header of a library that did load, for byte order, ABI and processor. See
    the generic ABI, https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html.
    """
    order = "<" if header[5] == 1 else ">"
    identity, machine = header[:16], header[18:20]
    text, symbols = b"\0libmlxq_blas.so\0", bytes(24)
    for name, address in addresses.items():
        # Name, STB_GLOBAL and STT_FUNC, visibility, SHN_ABS, value, size.
        symbols += struct.pack(order + "IBBHQQ", len(text), 0x12, 0, 0xFFF1, address, 0)
        text += name.encode() + b"\0"
    count = len(addresses)
    # DT_HASH with a single bucket: a chain that starts at the last symbol and goes down to the unused first one.
    hashes = struct.pack(f"{order}{count + 4}I", 1, count + 1, count, 0, *range(count))
    hashes += bytes(-len(hashes) % 8)
    tags = 7
    at_dynamic = 64 + 3 * 56
    at_symbols = at_dynamic + tags * 16
    at_hashes = at_symbols + len(symbols)
    at_text = at_hashes + len(hashes)
    size = at_text + len(text)
    # SONAME, HASH, STRTAB, SYMTAB, STRSZ, SYMENT, NULL.
    entries = (14, 1, 4, at_hashes, 5, at_text, 6, at_symbols, 10, len(text), 11, 24, 0, 0)
    elf = identity + struct.pack(order + "H", 3) + machine  # ET_DYN
    elf += struct.pack(order + "IQQQIHHHHHH", 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)
    # Type, flags, offset, address twice, size twice, alignment. The stack is named so that it need not be executable.
    elf += struct.pack(order + "II6Q", 1, 6, 0, 0, 0, size, size, 0x10000)  # PT_LOAD, rw
    elf += struct.pack(order + "II6Q", 2, 6, at_dynamic, at_dynamic, at_dynamic, tags * 16, tags * 16, 8)  # PT_DYNAMIC
    elf += struct.pack(order + "II6Q", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # PT_GNU_STACK
    return elf + struct.pack(f"{order}{2 * tags}Q", *entries) + symbols + hashes + text


def _load_globally(image: bytes) -> None:
    """Load a shared object from memory, where the system allows it, else from a file that is gone right after."""
    try:
        descriptor = os.memfd_create("mlxq-blas")
    except (AttributeError, OSError):  # a Python built for an old glibc has no such function; a sandbox may forbid it
        with tempfile.NamedTemporaryFile(prefix="mlxq-blas-", suffix=".so") as file:
            file.write(image)
            file.flush()
            _open_global(file.name)
        return
    with open(descriptor, "wb") as memory:
        memory.write(image)
        memory.flush()
        _open_global(f"/proc/self/fd/{descriptor}")


def _open_global(name: str) -> None:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError as exc:
        raise BlasFault(f"cannot be put under the names that MLX uses: {exc}", lasting=False) from exc
