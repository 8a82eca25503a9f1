"""Files of the Hub: from the cache or into it, or only as far as their headers go."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlxq import __version__
from mlxq.headers import MAX_HEADER_BYTES
from mlxq.retry import Waiting, patiently, told
from mlxq.sources.gguf_header import ROPE_FREQUENCIES, is_whole_header, span_of
from mlxq.sources.hub_errors import explained
from mlxq.sources.remote import Reference, RemoteFile

# A safetensors header takes about 110 bytes a tensor: this holds that of a usual shard in one request.
_FIRST_BYTES = 16_384
_FIRST_GGUF_BYTES = 512 << 10
_MAX_GGUF_HEADER_BYTES = 128 << 20
_MAX_GGUF_TENSOR_BYTES = 1 << 20
_REQUEST_TIMEOUT_S = 20.0
_AT_ONCE = 8
_T = TypeVar("_T")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Asking:
    """The Hub asked about one reference: with patience, which is told to ``on_wait``, and refusals in words."""

    reference: Reference
    on_wait: Callable[[Waiting], None]

    def once(self, call: Callable[[], _T]) -> _T:
        """What ``call`` returns, tried again where that helps. Raises MlxqError with what the Hub would not do."""
        return told(patiently(call, lambda exc: explained(exc, self.reference)), self.on_wait)

    def each(self, call: Callable[[_Item], _T], items: Iterable[_Item]) -> list[_T]:
        """``call`` on every item, several at a time."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(lambda item: self.once(lambda: call(item)), items))


def cached_file(repo: str, name: str, commit: str) -> Path | None:
    """Where the cache of ``huggingface_hub`` has a file, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def counting_bar(count: Callable[[int], None]) -> Any:
    """A progress bar class for ``huggingface_hub`` that shows nothing, and hands each number of bytes to ``count``."""
    from tqdm import tqdm

    class Counting(tqdm):  # type: ignore[misc]
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return Counting


def download_small(repo: str, name: str, commit: str) -> Path:
    """A small file, from the cache or into it."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=commit, tqdm_class=counting_bar(lambda _: None)))


def read_header(repo: str, commit: str, file: RemoteFile) -> dict[int, bytes]:
    """Pieces of a weight file by their offset: its start, as far as its header goes, and what is read with it."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo, file.name, revision=commit)
    if file.name.endswith(".gguf"):
        raw, more = b"", _FIRST_GGUF_BYTES
        most = min(file.nbytes, _MAX_GGUF_HEADER_BYTES)
        while len(raw) < most and not is_whole_header(raw):
            raw += _read_range(url, len(raw), min(most, len(raw) + more))
            more = len(raw)
        start, stop = span_of(raw, ROPE_FREQUENCIES)
        if len(raw) >= stop or stop - start > _MAX_GGUF_TENSOR_BYTES or stop > file.nbytes:
            return {0: raw}
        return {0: raw, start: _read_range(url, start, stop)}
    raw = _read_range(url, 0, min(file.nbytes, _FIRST_BYTES))
    end = 8 + struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    if len(raw) < end <= min(file.nbytes, MAX_HEADER_BYTES):
        raw += _read_range(url, len(raw), end)
    return {0: raw}


def _read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``start:stop`` of a file on the Hub."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = build_hf_headers(library_name="mlxq", library_version=__version__)
    headers |= {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_REQUEST_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        # A proxy that does not know ranges sends the file from its beginning.
        skipped = start if response.status_code == 200 else 0
        raw = bytearray()
        for piece in response.iter_bytes():
            raw += piece
            if len(raw) >= skipped + stop - start:
                break
    return bytes(raw[skipped : skipped + stop - start])
