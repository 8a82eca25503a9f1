"""A model split over several GGUF files, as ``llama-gguf-split`` names and numbers them.

``NAME-00001-of-00003.gguf`` says ``split.count`` 3 and ``split.no`` 0; it alone has the model's metadata. Each part
is a GGUF file of its own, with the tensors that lie in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mlxq.errors import BadInputError
from mlxq.sources.gguf_header import GGUFHeader, read_gguf_header

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_AGAIN = "Download all parts again, from one place, into one folder."


def parts_of(name: str) -> tuple[str, ...]:
    """The names of all parts of the model that the file ``name`` is a part of, in order; ``name`` where it is whole."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return (name,)
    count = int(found["count"])
    return tuple(f"{found['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def models_in(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The models that GGUF files make up: the name of the first part -> those of all parts, be they there or not."""
    found = (parts_of(name) for name in sorted(names))
    return {parts[0]: parts for parts in found}


def model_name(file_name: str) -> str:
    """What the model in a file is called, by the name of the file: no ``.gguf``, no number of a part."""
    found = _PART.fullmatch(file_name)
    return found["stem"] if found else file_name.removesuffix(".gguf")


def read_gguf(path: Path) -> GGUFHeader:
    """The header of the model that ``path`` is, or is one part of: metadata of the first part, tensors of all.

    Raises BadInputError as ``read_gguf_header`` does, and where a part is missing or of another model.
    """
    files = [path.with_name(name) for name in parts_of(path.name)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise BadInputError(f"{path} is one of {len(files)} parts, and {missing[0]} is missing{more}", _AGAIN)
    headers = [read_gguf_header(file) for file in files]
    for number, header in enumerate(headers, start=1):
        _check_part(header, number, len(files))
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    held = sum(len(header.tensors) for header in headers)
    if held > len(tensors):
        twice = next(n for n in tensors if sum(n in header.tensors for header in headers) > 1)
        raise BadInputError(f"tensor {twice!r} is in more than one part of {files[0]}", _AGAIN)
    expected = headers[0].metadata.get("split.tensors.count", held)
    if len(files) > 1 and held != expected:
        raise BadInputError(f"the parts of {files[0]} hold {held:,} tensors, and should hold {expected:,}", _AGAIN)
    return replace(headers[0], tensors=tensors, files=tuple(files))


def _check_part(header: GGUFHeader, number: int, count: int) -> None:
    """Raise BadInputError unless a file says itself that it is part ``number`` of ``count``."""
    # A file that was joined again says 0 parts.
    stated = max(header.metadata.get("split.count", 1), 1)
    if stated > 1 and count == 1:
        raise BadInputError(
            f"{header.path} is one of {stated:,} parts, and its name does not say which",
            "Name the parts as they were, in one folder: NAME-00001-of-"
            f"{stated:05}.gguf and so on; or join them: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    if stated != count:
        raise BadInputError(
            f"{header.path} says that it is one of {stated:,} parts, and its name says {count:,}", _AGAIN
        )
    stated_number = header.metadata.get("split.no", 0) + 1
    if count > 1 and stated_number != number:
        raise BadInputError(
            f"{header.path} says that it is part {stated_number:,}, and its name says {number:,}",
            "Give the parts the names that they had; or download them again.",
        )
