"""A model on the Hugging Face Hub, known by its headers alone until it is fetched.

Opening one costs a few requests and little transfer: the list of files, the small JSON files (through the cache of
``huggingface_hub``), and the header of each weight file by ranged requests. The headers are put in sparse files of
the right names and sizes in a temporary folder, which every reader of headers, ``mlx_lm`` among them, opens like the
real thing.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxq import __version__
from mlxq.errors import BadInputError, MlxqError
from mlxq.headers import MAX_HEADER_BYTES, read_json
from mlxq.retry import TRIES, Waiting, chain, is_offline, patiently, response_of, said_by, told
from mlxq.sources.gguf_header import is_whole_header
from mlxq.sources.remote import HubModel, RemoteFile, Scratch
from mlxq.sources.safetensors import SafetensorsFolder, open_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from mlxq.sources.gguf import GGUFSource

# Files that travel with the weights, at the top of a repository: what mlx_lm fetches, and licences.
COMPANIONS = (
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
CODE = "*.py"
INDEX = "model.safetensors.index.json"
# What the headers are read together with; a tokenizer settings file can have a megabyte of added tokens.
_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "hf_quant_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_SMALL_BYTES = 1_200_000
# A safetensors header takes about 110 bytes a tensor: this holds that of a usual shard in one request.
_FIRST_BYTES = 16_384
_FIRST_GGUF_BYTES = 512 << 10
_MAX_GGUF_HEADER_BYTES = 128 << 20
_REQUEST_TIMEOUT_S = 20.0
_AT_ONCE = 8

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./ +-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_T = TypeVar("_T")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Reference:
    """``org/name[/file.gguf][@revision]``, taken apart."""

    repo: str
    file: str | None
    revision: str | None


def parse_reference(text: str) -> Reference | None:
    """Take ``org/name[/file.gguf][@revision]`` apart; None where it is nothing of the kind."""
    found = _REFERENCE.fullmatch(text)
    if found is None or text.startswith(("./", "../", "~/")):
        return None
    return Reference(found["repo"], found["file"], found["revision"])


def open_hub(
    model: str,
    reference: Reference,
    *,
    tokenizer: bool = False,
    trust_remote_code: bool = False,
    on_wait: Callable[[Waiting], None],
) -> SafetensorsFolder | GGUFSource:
    """Open a model of the Hub by its headers, or whole where the cache of ``huggingface_hub`` has all of it.

    ``tokenizer`` fetches the tokenizer's files too, ``trust_remote_code`` the repository's Python files. With
    ``HF_HUB_OFFLINE`` only the cache is looked at. Raises BadInputError where the Hub has no such model, or does not
    let it be read, MlxqError where it cannot be reached.
    """
    from huggingface_hub import is_offline_mode

    offline = is_offline_mode()
    commit, files = _cached_listing(reference) if offline else _listing(reference, on_wait)
    try:
        weights = _weights(reference, commit, files, on_wait)
    except BadInputError as exc:
        raise _not_cached(reference, "the cache does not have all of it") if offline else exc from exc
    gguf = weights[0].endswith(".gguf")
    companions = [] if gguf else [n for n in files if _travels(n, trust_remote_code=trust_remote_code)]
    weight_files, companion_files = (tuple(RemoteFile(n, files[n]) for n in names) for names in (weights, companions))
    remote = HubModel(reference.repo, reference.revision or "main", commit, weight_files, companion_files, Scratch())
    here = {n: path for n in (*weights, *companions) if (path := cached_file(reference.repo, n, commit)) is not None}
    if all(name in here for name in (*weights, *companions)):
        return opened(remote, model, here)
    assert not offline, "a file that the cache lists is there"
    wanted = [n for n in companions if tokenizer or n.endswith(".py") or _is_small(n, files[n])]
    found = _each(lambda n: _download(reference.repo, n, commit), wanted, reference, on_wait)
    headers = _each(lambda f: _header(reference.repo, commit, f), remote.weights, reference, on_wait)
    for file, header in zip(remote.weights, headers, strict=True):
        _write_stand_in(remote.folder / Path(file.name).name, header, file.nbytes)
    _link(remote.folder, dict(zip(wanted, found, strict=True)))
    return replace(_open(remote, model), remote=remote)


def opened(remote: HubModel, name: str, files: Mapping[str, Path]) -> SafetensorsFolder | GGUFSource:
    """The same model with its files here: ``files`` says where each is."""
    local = replace(remote, scratch=Scratch())
    _link(local.folder, files)
    # The folder of links lives as long as the source does.
    return replace(_open(local, name), scratch=local.scratch)


def partly_opened(remote: HubModel, name: str, files: Mapping[str, Path]) -> SafetensorsFolder | GGUFSource:
    """The same model with some of its weight files here, and the headers of the others."""
    here = {Path(file).name for file in files}
    rest = {entry.name: entry for entry in remote.folder.iterdir() if entry.name not in here}
    return opened(remote, name, {**files, **rest})


def add_companions(remote: HubModel, files: Mapping[str, Path]) -> None:
    """Put companions that were fetched beside the headers."""
    _link(remote.folder, {name: path for name, path in files.items() if not (remote.folder / name).exists()})


def remember_revision(remote: HubModel) -> None:
    """Note in the cache of ``huggingface_hub`` which commit the revision means, for use offline.

    Its cache keeps one file for each, in ``refs``; a download by commit writes none.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if remote.revision != remote.commit:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=remote.repo, repo_type="model") / "refs"
        (folder / remote.revision).parent.mkdir(parents=True, exist_ok=True)
        (folder / remote.revision).write_text(remote.commit, encoding="utf-8")


def _open(remote: HubModel, name: str) -> SafetensorsFolder | GGUFSource:
    """Open ``remote.folder``; errors name the repository rather than a folder that is about to go."""
    try:
        if remote.weights[0].name.endswith(".gguf"):
            from mlxq.sources.gguf import open_gguf

            return replace(open_gguf(remote.folder / Path(remote.weights[0].name).name, name), revision=remote.commit)
        return open_folder(remote.folder, name, base_model=remote.repo, revision=remote.commit)
    except BadInputError as exc:
        raise BadInputError(exc.message.replace(str(remote.folder), remote.repo), exc.hint) from exc


def _link(folder: Path, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        (folder / Path(name).name).symlink_to(path.resolve())


# What a repository holds.


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="mlxq", library_version=__version__)


def _listing(reference: Reference, on_wait: Callable[[Waiting], None]) -> tuple[str, dict[str, int]]:
    """The commit a revision means now, and the size of each file."""
    asked = patiently(
        lambda: _api().model_info(reference.repo, revision=reference.revision, files_metadata=True),
        lambda exc: explained(exc, reference),
    )
    info = told(asked, on_wait)
    assert info.sha is not None
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _cached_listing(reference: Reference) -> tuple[str, dict[str, int]]:
    """The commit and files that the cache of ``huggingface_hub`` has of a revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(reference.repo, revision=reference.revision, local_files_only=True))
    except LocalEntryNotFoundError as exc:
        raise _not_cached(reference, "it is not in the cache") from exc
    return folder.name, {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _not_cached(reference: Reference, what: str) -> BadInputError:
    return BadInputError(
        f"{reference.repo} cannot be opened offline: {what}",
        "HF_HUB_OFFLINE is set; unset it once to fetch the model, or name a folder.",
    )


def _weights(
    reference: Reference, commit: str, files: Mapping[str, int], on_wait: Callable[[Waiting], None]
) -> list[str]:
    """The weight files that make up the model. Raises BadInputError where there are none mlxq reads."""
    repo = reference.repo
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if reference.file is not None:
        if reference.file not in files:
            close = difflib.get_close_matches(reference.file, ggufs, 1)
            hint = f"Did you mean {repo}/{close[0]}?" if close else _gguf_hint(repo, ggufs, files)
            raise BadInputError(f"{repo} has no file {reference.file}", hint)
        return [reference.file]
    names = sorted(n for n in files if fnmatch.fnmatchcase(n, "model*.safetensors") and "/" not in n)
    if names and "config.json" in files:
        return names if _is_whole(names) or INDEX not in files else _indexed(reference, commit, files, on_wait)
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise BadInputError(f"{repo} holds {len(ggufs)} GGUF files: name one", _gguf_hint(repo, ggufs, files))
    if names:
        raise BadInputError(f"{repo} is not a model mlxq can read: it has no config.json", "Name its base model.")
    others = sorted(n for n in files if n.endswith((".bin", ".pt", ".pth", ".safetensors", ".onnx")))
    raise BadInputError(
        f"{repo} has no model*.safetensors" + (f", only {', '.join(others[:3])}" if others else ""),
        "Look for a repository or a revision of the same model in safetensors or GGUF.",
    )


def _gguf_hint(repo: str, ggufs: Sequence[str], files: Mapping[str, int]) -> str | None:
    if not ggufs:
        return None
    listed = ", ".join(f"{repo}/{name} ({files[name] / 1e9:.1f} GB)" for name in ggufs[:12])
    return f"It has {listed}" + (f" and {len(ggufs) - 12} more." if ggufs[12:] else ".")


def _is_whole(names: Sequence[str]) -> bool:
    """Are these files one whole set, as their names have it?"""
    numbers = [_SHARD.fullmatch(name) for name in names]
    counts = {int(found[2]) for found in numbers if found}
    return names == ["model.safetensors"] or (all(numbers) and counts == {len(names)})


def _indexed(
    reference: Reference, commit: str, files: Mapping[str, int], on_wait: Callable[[Waiting], None]
) -> list[str]:
    """The files that the index lists, where names leave open which belong together."""
    (index,) = _each(lambda n: _download(reference.repo, n, commit), [INDEX], reference, on_wait)
    listed = sorted(set(map(str, (read_json(index).get("weight_map") or {}).values())))
    if missing := [name for name in listed if name not in files]:
        raise BadInputError(
            f"{reference.repo} is incomplete: its index lists {missing[0]}, which it does not hold",
            "Look for another revision, or ask its owner.",
        )
    return listed


def _travels(name: str, *, trust_remote_code: bool) -> bool:
    """Is this a file that goes with the weights?"""
    if "/" in name or (name.endswith(".index.json") and name != INDEX) or name == "mlxq.json":
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*COMPANIONS, *([CODE] if trust_remote_code else ())))


def _is_small(name: str, nbytes: int) -> bool:
    return name in _SMALL_FILES and (nbytes <= _SMALL_BYTES or name == "config.json")


# Getting what is needed to know it.


def _each(
    call: Callable[[_Item], _T], items: Iterable[_Item], reference: Reference, on_wait: Callable[[Waiting], None]
) -> list[_T]:
    """``call`` on every item, several at a time, each tried again where that helps."""

    def asked(item: _Item) -> _T:
        return told(patiently(lambda: call(item), lambda exc: explained(exc, reference)), on_wait)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(asked, items))


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


def resume_after_resets() -> None:
    """Have ``huggingface_hub`` go on after a connection that was reset, as it does after one that was closed.

    It resumes a download after errors of the protocol alone, and its HTTP library (httpx, or httpx2) calls a reset an
    error of reading: the client given to it here calls both the same.
    """
    from huggingface_hub import get_session, set_client_factory

    session = get_session()
    if getattr(session, "resumes_after_resets", False):
        return
    http: Any = importlib.import_module(type(session).__module__.partition(".")[0])

    class Body(http.SyncByteStream):  # type: ignore[misc]
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from self.inner
            except http.ReadError as exc:
                raise http.RemoteProtocolError(str(exc)) from exc

        def close(self) -> None:
            self.inner.close()

    class Client(http.Client):  # type: ignore[misc]
        resumes_after_resets = True

        def send(self, request: Any, **how: Any) -> Any:
            response = super().send(request, **how)
            response.stream = Body(response.stream)
            return response

    def client() -> Any:
        return Client(event_hooks=session.event_hooks, follow_redirects=True, timeout=None)

    set_client_factory(client)


def _download(repo: str, name: str, commit: str) -> Path:
    """A small file, from the cache or into it."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, name, revision=commit, tqdm_class=counting_bar(lambda _: None)))


def _header(repo: str, commit: str, file: RemoteFile) -> bytes:
    """The start of a weight file, as far as its header goes."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo, file.name, revision=commit)
    if file.name.endswith(".gguf"):
        raw, more = b"", _FIRST_GGUF_BYTES
        most = min(file.nbytes, _MAX_GGUF_HEADER_BYTES)
        while len(raw) < most and not is_whole_header(raw):
            raw += _read_range(url, len(raw), min(most, len(raw) + more))
            more = len(raw)
        return raw
    raw = _read_range(url, 0, min(file.nbytes, _FIRST_BYTES))
    end = 8 + struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else 0
    if len(raw) < end <= min(file.nbytes, MAX_HEADER_BYTES):
        raw += _read_range(url, len(raw), end)
    return raw


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


def _write_stand_in(file: Path, header: bytes, nbytes: int) -> None:
    """A sparse file with the header and the size of the real one."""
    with file.open("wb") as stream:
        stream.write(header)
        stream.flush()
        os.truncate(stream.fileno(), nbytes)


# What went wrong, in words.


def explained(exc: Exception, reference: Reference) -> MlxqError:
    """What the Hub would not do, in one line, and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from mlxq.machine.runtime import logged_in

    repo = reference.repo
    errors = list(chain(exc))
    if is_offline(exc):
        return _not_cached(reference, "HF_HUB_OFFLINE forbids asking the Hub")
    if any(isinstance(e, GatedRepoError) for e in errors):
        steps = f"Open {constants.ENDPOINT}/{repo}, click 'Agree and access repository'"
        return BadInputError(
            f"{repo} is gated: its owner asks you to accept terms first",
            f"{steps}, then run the same command again." if logged_in() else f"{steps}, then run: hf auth login",
        )
    if any(isinstance(e, RevisionNotFoundError) for e in errors):
        return BadInputError(
            f"{repo} has no revision {reference.revision!r}", f"Name a branch, tag or commit of it.{_branches(repo)}"
        )
    if any(isinstance(e, RepositoryNotFoundError) for e in errors):
        login = (
            "For a private one: your login may not be allowed to see it."
            if logged_in()
            else "For a private one, log in first: hf auth login"
        )
        near = _near(repo)
        return BadInputError(
            f"no model at {repo!r}: it is no folder here, and no repository on the Hub that you can see",
            f"Did you mean {near}? {login}" if near else f"Check the spelling. {login}",
        )
    if any(isinstance(e, EntryNotFoundError) for e in errors):
        return BadInputError(f"{repo} lacks a file it should have: {said_by(exc)}")
    response = response_of(exc)
    if response is not None and response.status_code == 401:
        return BadInputError("the Hub does not accept your login", "Run hf auth login again, or renew HF_TOKEN.")
    if response is not None and response.status_code == 403:
        return BadInputError(f"your login may not read {repo}: {said_by(exc)}", "Ask its owner, or use another token.")
    if response is not None and response.status_code == 429:
        return MlxqError(f"the Hub still limits how often it may be asked, after {TRIES} tries", _AGAIN)
    if response is not None and response.status_code >= 500:
        return MlxqError(f"the Hub has trouble of its own: it answered {response.status_code} for {repo}", _AGAIN)
    if response is not None and response.status_code >= 400:
        return BadInputError(f"the Hub refused {repo} ({response.status_code}): {said_by(exc)}")
    return MlxqError(
        f"no folder {repo!r} here, and the connection to the Hub broke: {said_by(errors[-1]) or type(exc).__name__}",
        f"Check the connection. {_AGAIN} HF_HUB_OFFLINE=1 uses what is in the cache.",
    )


_AGAIN = "The same command continues: files that are complete are not fetched again."


def _near(repo: str) -> str | None:
    """The repository whose name is closest to ``repo``, among those of its owner and those of its name."""
    owner, _, name = repo.partition("/")
    found: set[str] = set()
    questions: tuple[dict[str, Any], ...] = (
        {"author": owner},
        {"search": name},
        {"search": re.split(r"[-_.]", name)[0]},
    )
    for question in questions:
        try:
            found |= {model.id for model in _api().list_models(limit=200, **question)}
        except Exception:  # A suggestion is not worth a second error.
            break
    by_lower = {each.lower(): each for each in sorted(found)}
    close = difflib.get_close_matches(repo.lower(), by_lower, 1, 0.75)
    return by_lower[close[0]] if close else None


def _branches(repo: str) -> str:
    try:
        refs = _api().list_repo_refs(repo)
    except Exception:  # A suggestion is not worth a second error.
        return ""
    return f" It has {', '.join([ref.name for ref in (*refs.branches, *refs.tags)][:8])}."
