"""Safetensors headers and JSON files, read with no trust in what they hold."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError
from mlxq.files import refuse_pointer
from mlxq.reading import MAX_SMALL_BYTES, opened, read_bytes
from mlxq.tensors import DTYPE_BITS, TensorSpec

# The reference implementation refuses what is over 100 MB; of this size, a header has some 300,000 tensors.
MAX_HEADER_BYTES = MAX_SMALL_BYTES
# Values of a JSON text. Each takes some 60 bytes of memory, however few it has in the file; a vocabulary of 262,000
# with its merges, the largest known, has 2.1 million.
MAX_JSON_VALUES = 3_000_000
# What numpy holds, and no size or offset is larger on any machine.
MAX_DIMENSIONS = 64
MAX_SIZE = (1 << 63) - 1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its bytes are: ``offset`` counts from the start of ``file``."""

    spec: TensorSpec
    file: Path
    offset: int


def parse_header(raw: bytes, file_bytes: int, where: str) -> dict[str, tuple[TensorSpec, int]]:
    """Read a safetensors header, trusting nothing in it.

    ``raw`` starts with the 8-byte length and holds at least the whole header; ``file_bytes`` is the size of the
    whole file. Returns name -> (spec, absolute offset). Raises BadInputError where the header does not describe
    the file exactly: unknown dtype, a name twice, overlap, hole, or data past the end (safetensors format
    specification).
    """

    def bad(reason: str) -> BadInputError:
        return BadInputError(f"{where} is not a valid safetensors file: {reason}", "Download the file again.")

    if len(raw) < 8:
        raise bad("it is shorter than its own header length")
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > min(file_bytes, len(raw)):
        raise bad(f"it says its header has {header_bytes:,} bytes, and the file has {file_bytes:,}")
    try:
        header = parse_json(raw[8 : 8 + header_bytes], "line", distinct=True)
    except BadInputError as exc:
        raise bad(f"its header is not JSON as it should be: {exc.message}") from exc
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    found: dict[str, tuple[TensorSpec, int]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            name.encode()
            dtype, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as exc:
            raise bad(f"the entry of {name!r} is malformed") from exc
        if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_SIZE for n in (*shape, start, end)):
            raise bad(f"the entry of {name!r} is malformed")
        if dtype not in DTYPE_BITS:
            raise bad(f"{name!r} has an unknown dtype {dtype!r}")
        spec = TensorSpec(name, dtype, shape)
        if end - start != spec.nbytes:
            raise bad(f"{name!r} has {end - start:,} bytes where its shape needs {spec.nbytes:,}")
        spans.append((start, end, name))
        found[name] = (spec, 8 + header_bytes + start)
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise([(0, 0, ""), *spans]):
        if start < end:
            raise bad(f"{one!r} and {other!r} overlap")
        if start > end:
            raise bad(f"nothing accounts for the {start - end:,} bytes before {other!r}")
    rest = file_bytes - 8 - header_bytes - (spans[-1][1] if spans else 0)
    if rest < 0:
        raise bad(f"it is cut short by {-rest:,} bytes")
    if rest > 0:
        raise bad(f"nothing accounts for its last {rest:,} bytes")
    return found


def read_file_header(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one file, from its header alone."""
    with opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(8)
        refuse_pointer(file, head + stream.read(120))
        stream.seek(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        raw = head + stream.read(min(length, MAX_HEADER_BYTES, size))
    for spec, offset in parse_header(raw, size, str(file)).values():
        yield StoredTensor(spec, file, offset)


def encode_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header for ``specs`` laid out one after another, its length included, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_json(file: Path, limit: int = MAX_SMALL_BYTES) -> dict[str, Any]:
    """Read a JSON object, or raise BadInputError naming the file and line."""
    raw = read_bytes(file, limit)
    refuse_pointer(file, raw)
    return json_object(raw, str(file))


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that ``raw`` holds, or BadInputError naming ``where`` and the line."""
    data = parse_json(raw, where)
    if not isinstance(data, dict):
        raise BadInputError(f"{where} holds {type(data).__name__}, not a JSON object")
    return data


def parse_json(raw: bytes, where: str, *, distinct: bool = False) -> Any:
    """The data that ``raw`` holds as JSON, with ``distinct`` only where no object has a key twice.

    Raises BadInputError naming ``where`` and the line; for more values than any file of a model has, before one is
    made.
    """
    if raw.count(b",") + raw.count(b":") + raw.count(b"[") + raw.count(b"{") > MAX_JSON_VALUES:
        raise BadInputError(f"{where} holds over {MAX_JSON_VALUES:,} values")
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct if distinct else None)
    except UnicodeDecodeError as exc:
        raise BadInputError(f"{where} is not JSON: it is not UTF-8 text (byte {exc.start})") from exc
    except _Twice as exc:
        raise BadInputError(f"{where} has {exc} twice") from exc
    except json.JSONDecodeError as exc:
        raise BadInputError(f"{where}:{exc.lineno}: not valid JSON: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:
        raise BadInputError(f"{where}: its JSON is nested too deeply, or holds a number too long") from exc


class _Twice(ValueError):
    """A key that a JSON object has twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(next(repr(name) for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return found
