"""A model on the Hugging Face Hub: its headers by ranged requests, or its files through ``huggingface_hub``'s cache.

What only headers are wanted of becomes a folder of sparse files: each has the header and the length of the real one and
no data. Everything that reads headers reads such a folder like any other.
"""

from __future__ import annotations

import functools
import logging
import shutil
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlxq.errors import BadInputError, MlxqError
from mlxq.patience import chain, no_progress_bars, offline, patiently, response_of, said
from mlxq.sources.safetensors import MAX_HEADER_BYTES, SafetensorsFolder, open_folder, read_json

if TYPE_CHECKING:
    from mlxq.sources.gguf import GGUFSource

# The small files that travel with a model, and its card, whose licence and languages the new card takes over.
SMALL_FILES = (
    "*.json",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
    "LICENSE*",
    "README.md",
)
# Read first of a weight file: most headers are shorter.
FIRST_BYTES = 32 << 10
# Larger ones (tokenizer.json) are not needed to say what a model is, and are left out where only headers are wanted.
SMALL_BYTES = 256 << 10
# What ``inspect`` and a plan need of the small files whatever their size.
NEEDED_FILES = ("config.json", "model.safetensors.index.json")
# Free space beyond what is counted, for small files and the file system.
SPARE_BYTES = 64 << 20

_T = TypeVar("_T")
_log = logging.getLogger("mlxq.hub")


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit: the files it has, with their bytes."""

    repo: str
    commit: str
    files: dict[str, int]
    revision: str | None
    """As it was asked for; None is the main branch."""

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files ``mlx_lm`` reads weights from."""
        named = (name for name in self.files if "/" not in name and name.startswith("model"))
        return tuple(sorted(name for name in named if name.endswith(".safetensors")))

    def small_files(self, *, code: bool) -> tuple[str, ...]:
        """Everything else that travels with the model; ``code`` says whether its Python files are wanted."""
        patterns = (*SMALL_FILES, "*.py") if code else SMALL_FILES
        names = (name for name in self.files if "/" not in name and any(Path(name).match(p) for p in patterns))
        return tuple(sorted(names))


def open_hub(
    model: str, *, headers_only: bool, code: bool = False, tokenizer: bool = False
) -> SafetensorsFolder | GGUFSource:
    """Open ``org/name[@revision]``, or ``org/name/file.gguf[@revision]``.

    With ``headers_only`` no weights are fetched: the source can be planned and not read, and its tokenizer is there
    only where it is small or ``tokenizer`` asks for it. Else the files needed come
    through ``huggingface_hub``'s cache, the repository's own code only where ``code`` says so. Raises BadInputError
    where the Hub does not have it, MlxqError where it cannot be reached or the disk has no room.
    """
    name, _, revision = model.partition("@")
    repo, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if _offline_mode():
        return _from_cache(model, repo, file, revision or None)
    found = _asked(lambda: look(repo, revision or None), repo, revision)
    if file or not found.weight_files:
        return _open_gguf(model, found, file)
    folder = _mirror(found, tokenizer) if headers_only else _fetched(found, code=code)
    source = open_folder(folder, model, base_model=repo)
    return replace(source, revision=found.commit, headers_only=headers_only)


def look(repo: str, revision: str | None) -> HubModel:
    """Ask the Hub for a repository's commit and files: one request."""
    from huggingface_hub import HfApi

    info = HfApi(library_name="mlxq").model_info(repo, revision=revision, files_metadata=True)
    return HubModel(repo, str(info.sha), {s.rfilename: int(s.size or 0) for s in info.siblings or ()}, revision)


def _asked(call: Callable[[], _T], repo: str, revision: str = "") -> _T:
    """Call the Hub, waiting where it asks to and saying so."""
    asking = patiently(call, lambda exc: explained(exc, repo, revision))
    while True:
        try:
            waiting = next(asking)
        except StopIteration as stop:
            answer: _T = stop.value
            return answer
        _log.warning("%s; trying again in %.0f s", waiting.reason, waiting.seconds)


def _offline_mode() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _from_cache(model: str, repo: str, file: str, revision: str | None) -> SafetensorsFolder | GGUFSource:
    """What the cache has of it, where the Hub may not be asked."""
    from huggingface_hub import try_to_load_from_cache

    # Not snapshot_download: it takes a snapshot for broken that lacks files which nobody asked for.
    found = try_to_load_from_cache(repo, file or "config.json", revision=revision)
    if not isinstance(found, str):
        raise MlxqError(
            f"HF_HUB_OFFLINE is set, and the cache has no {model}", "Unset it, or run once with a connection."
        )
    folder = Path(found.removesuffix(file)) if file else Path(found).parent
    if file:
        from mlxq.sources.gguf import open_gguf

        return replace(open_gguf(folder / file, model), base_model=repo, revision=folder.name)
    return replace(open_folder(folder, model, base_model=repo), revision=folder.name)


def _fetched(found: HubModel, *, code: bool) -> Path:
    """The snapshot in ``huggingface_hub``'s cache, with all that is needed and nothing else."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    wanted = [*found.small_files(code=code), *found.weight_files]
    missing = sum(
        found.files[name]
        for name in wanted
        if not isinstance(try_to_load_from_cache(found.repo, name, revision=found.commit), str)
    )
    _check_room(found, missing)
    # Names of files are not patterns; what a pattern would make of one is kept literal.
    patterns = [name.replace("[", "[[]") for name in wanted]

    def snapshot(revision: str | None) -> Path:
        return Path(snapshot_download(found.repo, revision=revision, allow_patterns=patterns))

    # By its name first, so that the cache knows what the name means when there is no connection.
    folder = _asked(lambda: snapshot(found.revision), found.repo, found.revision or "")
    if folder.name != found.commit:
        folder = _asked(lambda: snapshot(found.commit), found.repo, found.commit)
    return folder


def fetch_file(repo: str, commit: str, name: str, folder: Path) -> Path:
    """Download one file into ``folder``, not the shared cache; a broken download continues."""
    from huggingface_hub import hf_hub_download

    return Path(_asked(lambda: hf_hub_download(repo, name, revision=commit, local_dir=folder), repo, commit))


def _check_room(found: HubModel, missing: int) -> None:
    """Raise MlxqError where the cache's disk has no room for what is still to come."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing and missing + SPARE_BYTES > free:
        raise MlxqError(
            f"{found.repo} has {missing:,} bytes to download, and the disk of {HF_HUB_CACHE} has {free:,} free",
            "Free some space, or set HF_HOME to a larger disk; --low-disk fetches one file at a time.",
        )


def _open_gguf(model: str, found: HubModel, file: str) -> GGUFSource:
    """The GGUF file named, or the only one there is. Its header holds the tokenizer, so it is fetched whole."""
    from huggingface_hub import hf_hub_download

    from mlxq.sources.gguf import open_gguf

    there = sorted(name for name in found.files if name.endswith(".gguf"))
    if not file and len(there) != 1:
        others = sorted(name for name in found.files if name.endswith((".bin", ".pt", ".safetensors")))
        raise BadInputError(
            f"{found.repo} has no model*.safetensors" + (f" and {len(there)} GGUF files" if there else ""),
            f"Name one of them: {found.repo}/{there[0]}"
            if there
            else f"It has {', '.join(others[:3]) or 'no weights'}.",
        )
    name = file or there[0]
    if name not in found.files:
        near = f"It has {', '.join(there[:5])}." if there else "It has no GGUF files."
        raise BadInputError(f"{found.repo} has no file {name!r}", near)
    path = _asked(lambda: hf_hub_download(found.repo, name, revision=found.commit), found.repo, found.commit)
    return replace(open_gguf(Path(path), model), base_model=found.repo, revision=found.commit)


# Headers alone.


@functools.cache
def _scratch() -> Path:
    """Where sparse folders live while the program runs."""
    import atexit

    folder = tempfile.TemporaryDirectory(prefix="mlxq-hub-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _mirror(found: HubModel, tokenizer: bool) -> Path:
    """A folder with the repository's small files, and weight files of headers and holes."""
    folder = _scratch() / f"{found.repo.replace('/', '--')}-{found.commit}{'-tokenizer' * tokenizer}"
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download

    building = Path(tempfile.mkdtemp(dir=_scratch()))

    def small(name: str) -> None:
        path = _asked(lambda: hf_hub_download(found.repo, name, revision=found.commit), found.repo, found.commit)
        shutil.copyfile(path, building / name)

    def weights(name: str) -> None:
        header = _asked(lambda: _header(found, name), found.repo, found.commit)
        with (building / name).open("wb") as file:
            file.write(header)
            file.truncate(found.files[name])

    names = [
        name
        for name in found.small_files(code=False)
        if name in NEEDED_FILES or tokenizer or (found.files[name] <= SMALL_BYTES and name != "README.md")
    ]
    with no_progress_bars(), ThreadPoolExecutor(8) as pool:
        list(pool.map(small, names))
        index = building / "model.safetensors.index.json"
        shards = set(map(str, read_json(index).get("weight_map", {}).values())) if index.is_file() else None
        list(pool.map(weights, [name for name in found.weight_files if shards is None or name in shards]))
    building.rename(folder)
    return folder


def _header(found: HubModel, name: str) -> bytes:
    """The first bytes of a safetensors file: its length field and its header."""
    size = found.files[name]
    start = _ranged(found, name, 0, min(FIRST_BYTES, size))
    length = 8 + (struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0)
    if length > min(size, MAX_HEADER_BYTES):
        raise BadInputError(f"{found.repo}/{name} is not a valid safetensors file", "Look at it on the Hub.")
    if length > len(start):
        start += _ranged(found, name, len(start), length)
    return start[:length]


def _ranged(found: HubModel, name: str, start: int, stop: int) -> bytes:
    """Bytes ``start:stop`` of a file on the Hub."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(found.repo, name, revision=found.commit)
    headers = {**build_hf_headers(library_name="mlxq"), "Range": f"bytes={start}-{stop - 1}"}
    response = get_session().get(url, headers=headers, follow_redirects=True)
    hf_raise_for_status(response)
    content = bytes(response.content)
    if response.status_code != 206:
        content = content[start:stop]
    if len(content) != stop - start:
        raise OSError(f"{name}: asked for {stop - start} bytes and got {len(content)}")
    return content


def explained(exc: Exception, repo: str, revision: str) -> MlxqError:
    """What went wrong on the Hub, in one line, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    again = "Run the same command again: what has come stays, and a broken download continues."
    if offline(exc):
        return MlxqError(f"HF_HUB_OFFLINE is set, and the cache has no {repo}", "Unset it.")
    kinds = {
        kind
        for kind in (GatedRepoError, RevisionNotFoundError, RepositoryNotFoundError)
        if any(isinstance(each, kind) for each in chain(exc))
    }
    if GatedRepoError in kinds:
        return BadInputError(
            f"{repo} is gated: its owner asks you to accept terms first",
            f"Open https://huggingface.co/{repo}, accept its terms, then run: hf auth login",
        )
    if RevisionNotFoundError in kinds:
        return BadInputError(f"{repo} has no revision {revision!r}", "Name a branch, a tag or a commit of it.")
    if RepositoryNotFoundError in kinds:
        near = _near(repo)
        hint = f"Did you mean {near}? " if near else "Check the spelling. "
        return BadInputError(
            f"no model at {repo!r}: it is no folder here, and no repository on the Hub that you can see",
            f"{hint}For a private repository run: hf auth login",
        )
    response = response_of(exc)
    if response is None:
        *_, root = chain(exc)
        return MlxqError(f"no folder {repo!r} here, and the Hub could not be reached for it: {said(root)}", again)
    if response.status_code in (401, 403):
        return BadInputError(f"the Hub does not let you read {repo}", "Log in with hf auth login, or renew HF_TOKEN.")
    if response.status_code == 429:
        return MlxqError("the Hub still limits how often it may be asked", again)
    if response.status_code >= 500:
        return MlxqError(f"the Hub has trouble of its own: it answered {response.status_code}", again)
    return BadInputError(f"the Hub refused ({response.status_code}): {said(exc)}")


def _near(repo: str) -> str | None:
    """A repository of nearly that name, where the Hub offers one."""
    import difflib

    from huggingface_hub import HfApi

    owner, _, name = repo.partition("/")
    api = HfApi(library_name="mlxq")
    try:
        ids = [model.id for model in api.list_models(author=owner, limit=200)]
        ids += [model.id for model in api.list_models(search=name, limit=20)]
    except Exception:  # a suggestion is a courtesy: whatever stops it must not hide what went wrong
        return None
    close = difflib.get_close_matches(repo, ids, 1, cutoff=0.6)
    return close[0] if close else None
