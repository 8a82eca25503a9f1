"""The header of a GGUF file: metadata and tensor table, read without touching the weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Parsed here
rather than by ``gguf.GGUFReader``, which builds one array per vocabulary entry (seconds on a usual vocabulary)
and does not notice that a file is cut short.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError
from mlxq.files import refuse_pointer
from mlxq.reading import opened

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# How files of the formats before it begin.
_OLDER_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}
# Types that llama.cpp once wrote and has removed, by number; each had been Q4 or IQ4_NL in an order of its own.
_RETIRED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4 (or BitNet's I2_S)",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
# Forks of llama.cpp number their own types up to some hundreds; what is far above is a damaged header.
_HIGHEST_TYPE = 1023
DEFAULT_ALIGNMENT = 32
# What GGML itself allows; a larger number is a corrupt header.
MAX_DIMENSIONS = 4
MAX_TENSORS = 1 << 17
# Holds rope frequencies, the one tensor whose values are read with the header: they go to config.json.
ROPE_FREQUENCIES = "rope_freqs.weight"
# Far above any chat template or vocabulary; what a corrupt length can make us hold stays small.
MAX_VALUE_BYTES = 1 << 26
# Values and elements of lists in all: a vocabulary of 262,000 with scores, types and merges, the largest known, has 1.3
# million.
MAX_VALUES = 3_000_000

# What the keys we read hold, by the specification; the rest may hold what they like.
_TEXT = ("general.architecture", "tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre")
_WHOLE = (
    "general.alignment",
    "split.count",
    "split.no",
    "split.tensors.count",
    *(f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "unknown", "padding", "eot", "eom")),
)
_NUMBERS = tuple(f"general.sampling.{name}" for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat"))
_TEXTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
_ARRAYS = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
_KEYS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(_TEXT, ("text", (str,))),
    **dict.fromkeys(_WHOLE, ("a whole number", (int,))),
    **dict.fromkeys(_NUMBERS, ("a number", (int, float))),
    **dict.fromkeys(_TEXTS, ("a list of texts", (list,))),
    **dict.fromkeys(_ARRAYS, ("a list of numbers", (tuple,))),
}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9


_OTHERWISE = "Take a newer file of the model, or quantize the original from the Hub."


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor: ``ggml_type`` by name (``"Q4_K"``), ``shape`` outermost first, ``offset`` into ``file``."""

    name: str
    ggml_type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF file says about itself. Arrays of numbers are tuples, arrays of strings lists.

    ``files`` are all that hold its tensors, ``path`` the first of them.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    files: tuple[Path, ...]


class _Malformed(Exception):
    """The header breaks the format; the message says how."""


class _Unsupported(_Malformed):
    """The header keeps a format, which is not read here; ``hint`` is the way out."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class _Ended(_Malformed):
    """The data ends before the header does."""


class _Cursor:
    """Reads one value after another, never past the end of the file."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data = data
        self.at = 0
        self.values = 0

    def take(self, nbytes: int) -> bytes:
        end = self.at + nbytes
        if end > len(self.data):
            raise _Ended("it is cut short inside its header")
        if nbytes > MAX_VALUE_BYTES:
            raise _Malformed(f"a value at byte {self.at:,} of its header takes {nbytes:,} bytes")
        chunk = self.data[self.at : end]
        self.at = end
        return chunk

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise _Malformed(f"a string before byte {self.at:,} of its header is not UTF-8") from exc

    def strings(self, count: int) -> list[str]:
        # A vocabulary has a quarter of a million of them, so this is string() with its calls unrolled.
        data, at, size = self.data, self.at, len(self.data)
        length = struct.Struct("<Q").unpack_from
        limit = min(size, at + MAX_VALUE_BYTES)
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length(data, at)[0]
                if at > limit:
                    kind = _Ended if at > size else _Malformed
                    raise kind("it is cut short inside its header, or a list of strings in it is corrupt")
                found.append(data[start:at].decode())
        except struct.error as exc:
            raise _Ended("it is cut short inside its header") from exc
        except UnicodeDecodeError as exc:
            raise _Malformed(f"a string before byte {at:,} of its header is not UTF-8") from exc
        self.at = at
        return found

    def count(self, values: int) -> None:
        """Refuse more values than any model has, before they are made."""
        self.values += values
        if self.values > MAX_VALUES:
            raise _Malformed(f"its metadata holds over {MAX_VALUES:,} values")

    def value(self, kind: int) -> Any:
        self.count(1)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise _Malformed(f"its metadata has a value of unknown type {kind}")
        number = self.number(_SCALARS[kind])
        return _shortest_float32(number) if kind == 6 else number

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        # The smallest element is one byte, a string eight: a larger count cannot fit in what is left.
        if count * (8 if kind in (_STRING, _ARRAY) else 1) > len(self.data) - self.at:
            raise _Ended("it is cut short inside its header")
        self.count(count)
        if kind == _STRING:
            return self.strings(count)
        if kind == _ARRAY:
            raise _Unsupported("its metadata nests arrays", _OTHERWISE)
        if kind not in _SCALARS:
            raise _Malformed(f"its metadata has an array of unknown type {kind}")
        layout = f"<{count}{_SCALARS[kind]}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of ``path``, trusting nothing in it.

    Raises BadInputError where the file is not GGUF, is of a version, byte order or tensor type that is not
    supported, or is cut short: each tensor must lie wholly inside the file.
    """
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        refuse_pointer(path, stream.read(128))
        stream.seek(0)
        begins = stream.read(4)
        if begins in _OLDER_MAGICS:
            raise BadInputError(f"{path} is {_OLDER_MAGICS[begins]}, a format before GGUF", _OTHERWISE)
        if begins != MAGIC:
            raise BadInputError(
                f"{path} is not a GGUF file: it does not start with {MAGIC.decode()}",
                "Download it again if it should be one; a web page is often saved instead.",
            )
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(_Cursor(data), path, size)
            except _Unsupported as exc:
                raise BadInputError(f"{path} can't be read: {exc}", exc.hint) from exc
            except _Malformed as exc:
                raise BadInputError(f"{path} is not a complete GGUF file: {exc}", "Download the file again.") from exc


def is_whole_header(beginning: bytes) -> bool:
    """Whether the header of a GGUF file ends within its ``beginning``, or breaks the format there."""
    try:
        _parse(_Cursor(beginning), Path(), 1 << 62)
    except _Ended:
        return False
    except _Malformed:
        return True
    return True


def span_of(beginning: bytes, name: str) -> tuple[int, int]:
    """The bytes of a GGUF file, first and behind the last, that hold tensor ``name``; none where it has none.

    ``beginning`` holds its header.
    """
    try:
        tensor = _parse(_Cursor(beginning), Path(), 1 << 62).tensors.get(name)
    except _Malformed:  # Said when the header is read for good.
        return 0, 0
    return (0, 0) if tensor is None else (tensor.offset, tensor.offset + tensor.nbytes)


def _parse(cursor: _Cursor, path: Path, size: int) -> GGUFHeader:
    cursor.take(len(MAGIC))
    version = cursor.number("I")
    _check_version(version)
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    if tensor_count > MAX_TENSORS:
        raise _Malformed(f"it says it holds {tensor_count:,} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        if key in metadata:
            raise _Malformed(f"its metadata has {key!r} twice")
        value = metadata[key] = cursor.value(cursor.number("I"))
        if key in _KEYS and type(value) not in _KEYS[key][1]:
            raise _Malformed(f"{key} is not {_KEYS[key][0]}")
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if alignment <= 0 or alignment % 8:
        raise _Malformed(f"its alignment is {alignment!r}")
    data_start = -(-cursor.at // alignment) * alignment
    locate = _locator(path, data_start, size)
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise _Malformed(f"tensor {name!r} is in it twice")
        tensors[name] = locate(name, shape, type_id, offset)
    for one, other in pairwise(sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))):
        if one.offset + one.nbytes > other.offset:
            raise _Malformed(f"tensors {one.name!r} and {other.name!r} overlap")
    return GGUFHeader(path, metadata, tensors, (path,))


def _check_version(version: int) -> None:
    """Raise unless it is one that is read here."""
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in (1, *VERSIONS):
        raise _Unsupported(
            "it is big-endian",
            "Take the little-endian file of the model, or turn a copy round with the gguf package: "
            "gguf-convert-endian COPY.gguf little",
        )
    if version == 1:
        raise _Unsupported("it is GGUF of version 1, which was written in August 2023 alone", _OTHERWISE)
    if VERSIONS[-1] < version < 1 << 16:
        raise _Unsupported(
            f"it is GGUF of version {version:,}, and {VERSIONS[0]} and {VERSIONS[1]} are known here",
            "Update mlxq, or take a file of an older version.",
        )
    raise _Malformed(f"it says it has version {version:,}")


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    count = cursor.number("I")
    if count > MAX_DIMENSIONS:
        raise _Malformed(f"tensor {name!r} has {count:,} dimensions")
    innermost_first = tuple(cursor.number("Q") for _ in range(count))
    return name, innermost_first[::-1], cursor.number("I"), cursor.number("Q")


def _locator(path: Path, data_start: int, size: int) -> Callable[[str, tuple[int, ...], int, int], GGUFTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    def locate(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
        try:
            kind = GGMLQuantizationType(type_id)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as exc:
            raise _unknown_type(name, type_id) from exc
        columns = shape[-1] if shape else 1
        if columns % block_size:
            raise _Malformed(f"tensor {name!r} has rows of {columns:,}, no multiple of {kind.name}'s {block_size}")
        nbytes = prod(shape) // block_size * block_bytes
        missing = data_start + offset + nbytes - size
        if missing > 0:
            raise _Malformed(f"it is cut short by {missing:,} bytes (tensor {name!r})")
        return GGUFTensor(name, kind.name, shape, data_start + offset, nbytes, path)

    return locate


def _unknown_type(name: str, type_id: int) -> _Malformed:
    if type_id in _RETIRED_TYPES:
        return _Unsupported(
            f"tensor {name!r} is {_RETIRED_TYPES[type_id]}, a type that llama.cpp has removed",
            "Take a file of another type, such as Q4_0 or Q4_K_M, or quantize the original model from the Hub.",
        )
    if type_id > _HIGHEST_TYPE:
        return _Malformed(f"tensor {name!r} has type {type_id}, and there are not so many")
    return _Unsupported(
        f"tensor {name!r} has type {type_id}, which the gguf package does not know",
        "A newer one may (pip install -U gguf), unless a fork of llama.cpp wrote it: then take a file of another "
        "type, or quantize the original model from the Hub.",
    )


def _shortest_float32(value: float) -> float:
    """The number a person wrote for a float32: 1e-05, not 9.999999747378752e-06."""
    raw = struct.pack("<f", value)
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("<f", short) == raw:
                return short
        except OverflowError:
            continue
    return value
