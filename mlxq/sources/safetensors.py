"""A folder of safetensors files: the usual form of a model on the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.tensors import DTYPE_BITS, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from mlxq.sources.remote import HubModel, Scratch

# A header larger than this is refused by the reference implementation too.
MAX_HEADER_BYTES = 100_000_000
# What numpy holds, and no size or offset is larger on any machine.
MAX_DIMENSIONS = 64
MAX_SIZE = (1 << 63) - 1

# Files that are weights or belong to other runtimes; everything else beside config.json travels along.
_NOT_SIDECARS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
    ".mlmodel",
)
_NOT_SIDECAR_NAMES = {
    "config.json",
    "mlxq.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "hf_quant_config.json",
    "recipe.yaml",
}


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
    if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
        raise bad(f"it says its header has {header_bytes:,} bytes, and the file has {file_bytes:,}")
    try:
        header = json.loads(raw[8 : 8 + header_bytes], object_pairs_hook=_distinct)
    except _Twice as exc:
        raise bad(f"its header has {exc} twice") from exc
    except (ValueError, RecursionError) as exc:
        raise bad("its header is not JSON") from exc
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


class _Twice(ValueError):
    """A key that a JSON object has twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Twice(next(repr(name) for name, count in Counter(name for name, _ in pairs).items() if count > 1))
    return found


def read_file_header(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one file, from its header alone."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        raw = head + stream.read(min(length, MAX_HEADER_BYTES, size))
    for spec, offset in parse_header(raw, size, str(file)).values():
        yield StoredTensor(spec, file, offset)


def pread_exactly(descriptor: int, nbytes: int, offset: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read ``nbytes`` at ``offset`` into a fresh buffer; short reads are retried, an early end is an error."""
    import numpy as np

    buffer = np.empty(nbytes, dtype=np.uint8)
    view = memoryview(buffer.data)
    done = 0
    while done < nbytes:
        # A single read is capped near 2 GiB by the kernel.
        count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise BadInputError("a weight file became shorter while it was being read")
        done += count
    return buffer


_NUMPY_DTYPES = {
    "BOOL": "uint8",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "uint8",
    "F8_E4M3": "uint8",
    "F8_E8M0": "uint8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "uint16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


@dataclass(frozen=True)
class SafetensorsFolder:
    """A model folder, satisfying ``ModelSource``. ``scratch`` keeps a temporary ``folder`` in place."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    base_model: str | None = None
    revision: str | None = None
    trusted: bool = False
    kind: str = "safetensors"
    remote: HubModel | None = None
    scratch: Scratch | None = None

    @property
    def weights_folder(self) -> Path:
        """``mlx_lm`` opens the folder as it stands."""
        return self.folder

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by its checkpoint name."""
        return {name: tensor.spec for name, tensor in self.stored.items()}

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights, sorted."""
        return tuple(sorted({tensor.file for tensor in self.stored.values()}))

    @property
    def stored_bytes(self) -> int:
        """Bytes the weights take as stored."""
        return sum(tensor.spec.nbytes for tensor in self.stored.values())

    @property
    def sidecars(self) -> dict[str, Path | bytes]:
        """Top-level files that are neither weights, config nor documentation assets."""
        return {
            file.name: file
            for file in sorted(self.folder.iterdir())
            if file.is_file()
            and not file.name.startswith(".")
            and file.name != "README.md"
            and file.name not in _NOT_SIDECAR_NAMES
            and file.suffix.lower() not in _NOT_SIDECARS
        }

    def read_rows(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start:stop`` of tensor ``name``; see ``ModelSource.read_rows``."""
        import numpy as np

        assert self.remote is None, "the weights are still on the Hub"
        tensor = self.stored[name]
        spec = tensor.spec
        row_bytes = spec.nbytes // max(spec.rows, 1)
        descriptor = os.open(tensor.file, os.O_RDONLY)
        try:
            raw = pread_exactly(descriptor, (stop - start) * row_bytes, tensor.offset + start * row_bytes)
        finally:
            os.close(descriptor)
        columns = spec.shape[-1] if spec.shape else 1
        return raw.view(np.dtype(_NUMPY_DTYPES[spec.dtype])).reshape(stop - start, columns)

    def repack_format(self, name: str) -> None:
        """Safetensors hold no foreign blocks to repack."""
        return

    def read_repacked(self, name: str, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Never called: ``repack_format`` is None for every tensor."""
        raise AssertionError(f"{name} has no blocks to repack")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, or raise BadInputError naming the file and line."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as exc:
        raise BadInputError(f"{file} is not UTF-8 text") from exc
    except json.JSONDecodeError as exc:
        raise BadInputError(f"{file}:{exc.lineno}: not valid JSON: {exc.msg}") from exc
    except (ValueError, RecursionError) as exc:
        raise BadInputError(f"{file}: its JSON is nested too deeply, or holds a number too long") from exc
    if not isinstance(data, dict):
        raise BadInputError(f"{file} holds {type(data).__name__}, not a JSON object")
    return data


def open_folder(folder: Path, name: str, *, trusted: bool = False) -> SafetensorsFolder:
    """Open a model folder by its headers; ``trusted`` where its own Python files may run.

    Reads the files ``mlx_lm`` would read (``model*.safetensors``). Raises BadInputError where the folder is not a
    model, or where the index names files that are not there.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        hint = "Name a folder with config.json and model*.safetensors, a .gguf file, or a Hub id such as org/name."
        if any(folder.glob("*.gguf")):
            hint = f"It holds GGUF files; name one of them, such as {next(iter(sorted(folder.glob('*.gguf'))))}."
        raise BadInputError(f"{folder} is not a model folder: it has no config.json", hint)
    config = read_json(config_file)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        others = [p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".safetensors"}]
        raise BadInputError(
            f"{folder} has no model*.safetensors",
            f"It has {', '.join(sorted(others)[:3])}; save the model as model*.safetensors first." if others else None,
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise BadInputError(f"{index} has no weight_map")
        missing = sorted(set(map(str, weight_map.values())) - {p.name for p in files})
        if missing:
            raise BadInputError(
                f"{folder} is incomplete: {missing[0]} is missing"
                + (f" and {len(missing) - 1} more" if missing[1:] else ""),
                "Download the missing files; the index lists them.",
            )
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_file_header(file):
            if tensor.spec.name in stored:
                raise BadInputError(
                    f"tensor {tensor.spec.name!r} is in both {stored[tensor.spec.name].file.name} and {file.name}",
                    "Remove the weights that do not belong to the model.",
                )
            stored[tensor.spec.name] = tensor
    if not stored:
        raise BadInputError(f"{folder} holds no tensors")
    return SafetensorsFolder(name, folder, config, stored, trusted=trusted)
