"""A model on the Hugging Face Hub, known by its headers alone until it is fetched.

Opening one costs a few requests and little transfer: the list of files, the small JSON files (through the cache of
``huggingface_hub``), and the header of each weight file by ranged requests. The headers are put in sparse files of
the right names and sizes in a temporary folder, which every reader of headers, ``mlx_lm`` among them, opens like the
real thing.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxq.errors import BadInputError
from mlxq.headers import read_json
from mlxq.retry import Waiting
from mlxq.sources.belongings import READ, TEMPLATES, left_behind, travels
from mlxq.sources.gguf_parts import models_in, parts_of
from mlxq.sources.hub_errors import hub_api, not_cached
from mlxq.sources.hub_files import Asking, cached_file, download_small, read_header
from mlxq.sources.remote import HubModel, Reference, RemoteFile, Scratch
from mlxq.sources.safetensors import SafetensorsFolder, open_folder

if TYPE_CHECKING:
    from mlxq.sources.gguf import GGUFSource

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
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def open_hub(
    model: str,
    reference: Reference,
    *,
    tokenizer: bool = False,
    trusted: bool = False,
    on_wait: Callable[[Waiting], None],
) -> SafetensorsFolder | GGUFSource:
    """Open a model of the Hub by its headers, or whole where the cache of ``huggingface_hub`` has all of it.

    ``tokenizer`` fetches the tokenizer's files too, ``trusted`` the repository's Python files. With
    ``HF_HUB_OFFLINE`` only the cache is looked at. Raises BadInputError where the Hub has no such model, or does not
    let it be read, MlxqError where it cannot be reached.
    """
    from huggingface_hub import is_offline_mode

    offline, asking = is_offline_mode(), Asking(reference, on_wait)
    commit, files = _cached_listing(reference) if offline else _listing(asking)
    try:
        weights = _weights(asking, commit, files)
    except BadInputError as exc:
        raise not_cached(reference, "the cache does not have all of it") if offline else exc from exc
    gguf = weights[0].endswith(".gguf")
    companions = [] if gguf else [n for n in files if _travels(n, trusted=trusted)]
    weight_files, companion_files = (tuple(RemoteFile(n, files[n]) for n in names) for names in (weights, companions))
    not_taken = {} if gguf else left_behind(files, weights, trusted=trusted)
    remote = HubModel(
        reference.repo,
        reference.revision or "main",
        commit,
        weight_files,
        companion_files,
        not_taken,
        trusted,
        Scratch(),
    )
    here = {n: path for n in (*weights, *companions) if (path := cached_file(reference.repo, n, commit)) is not None}
    if all(name in here for name in (*weights, *companions)):
        return opened(remote, model, here)
    assert not offline, "a file that the cache lists is there"
    wanted = [n for n in companions if tokenizer or n.endswith(".py") or _is_small(n, files[n])]
    found = asking.each(lambda n: download_small(reference.repo, n, commit), wanted)
    headers = asking.each(lambda f: read_header(reference.repo, commit, f), remote.weights)
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
        found = open_folder(remote.folder, name, trusted=remote.trusted, scratch=remote.scratch)
        return replace(found, base_model=remote.repo, revision=remote.commit, not_taken=remote.not_taken)
    except BadInputError as exc:
        raise BadInputError(exc.message.replace(str(remote.folder), remote.repo), exc.hint) from exc


def _link(folder: Path, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        link = folder / (name if _is_template(name) else Path(name).name)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path.resolve())


def _listing(asking: Asking) -> tuple[str, dict[str, int]]:
    """The commit a revision means now, and the size of each file."""
    reference = asking.reference
    info = asking.once(lambda: hub_api().model_info(reference.repo, revision=reference.revision, files_metadata=True))
    assert info.sha is not None
    return info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _cached_listing(reference: Reference) -> tuple[str, dict[str, int]]:
    """The commit and files that the cache of ``huggingface_hub`` has of a revision."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(reference.repo, revision=reference.revision, local_files_only=True))
    except LocalEntryNotFoundError as exc:
        raise not_cached(reference, "it is not in the cache") from exc
    return folder.name, {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _weights(asking: Asking, commit: str, files: Mapping[str, int]) -> list[str]:
    """The weight files that make up the model. Raises BadInputError where there are none mlxq reads."""
    reference, repo = asking.reference, asking.reference.repo
    ggufs = models_in(name for name in files if name.endswith(".gguf"))
    if reference.file is not None:
        if reference.file not in files:
            close = difflib.get_close_matches(reference.file, ggufs, 1)
            hint = f"Did you mean {repo}/{close[0]}?" if close else _gguf_hint(repo, ggufs, files)
            raise BadInputError(f"{repo} has no file {reference.file}", hint)
        return _all_parts(repo, parts_of(reference.file), files)
    names = sorted(n for n in files if fnmatch.fnmatchcase(n, "model*.safetensors") and "/" not in n)
    if names and "config.json" in files:
        return names if _is_whole(names) or INDEX not in files else _indexed(asking, commit, files)
    if len(ggufs) == 1:
        return _all_parts(repo, next(iter(ggufs.values())), files)
    if ggufs:
        raise BadInputError(f"{repo} holds {len(ggufs)} GGUF models: name one", _gguf_hint(repo, ggufs, files))
    if names:
        raise BadInputError(f"{repo} is not a model mlxq can read: it has no config.json", "Name its base model.")
    others = sorted(n for n in files if n.endswith((".bin", ".pt", ".pth", ".safetensors", ".onnx")))
    raise BadInputError(
        f"{repo} has no model*.safetensors" + (f", only {', '.join(others[:3])}" if others else ""),
        "Look for a repository or a revision of the same model in safetensors or GGUF.",
    )


def _all_parts(repo: str, parts: Sequence[str], files: Mapping[str, int]) -> list[str]:
    """``parts``, all of which a repository must hold."""
    if missing := [name for name in parts if name not in files]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise BadInputError(
            f"{repo} is incomplete: of {len(parts)} parts it does not hold {missing[0]}{more}",
            "Look for another revision, or another repository of the same model.",
        )
    return list(parts)


def _gguf_hint(repo: str, ggufs: Mapping[str, Sequence[str]], files: Mapping[str, int]) -> str | None:
    if not ggufs:
        return None
    listed = []
    for name, parts in list(ggufs.items())[:12]:
        nbytes = sum(files.get(part, 0) for part in parts)
        listed.append(f"{repo}/{name} ({f'{len(parts)} parts, ' if parts[1:] else ''}{nbytes / 1e9:.1f} GB)")
    return f"It has {', '.join(listed)}" + (f" and {len(ggufs) - 12} more." if len(ggufs) > 12 else ".")


def _is_whole(names: Sequence[str]) -> bool:
    """Are these files one whole set, as their names have it?"""
    numbers = [_SHARD.fullmatch(name) for name in names]
    counts = {int(found[2]) for found in numbers if found}
    return names == ["model.safetensors"] or (all(numbers) and counts == {len(names)})


def _indexed(asking: Asking, commit: str, files: Mapping[str, int]) -> list[str]:
    """The files that the index lists, where names leave open which belong together."""
    repo = asking.reference.repo
    index = asking.once(lambda: download_small(repo, INDEX, commit))
    listed = sorted(set(map(str, (read_json(index).get("weight_map") or {}).values())))
    if missing := [name for name in listed if name not in files]:
        raise BadInputError(
            f"{repo} is incomplete: its index lists {missing[0]}, which it does not hold",
            "Look for another revision, or ask its owner.",
        )
    return listed


def _travels(name: str, *, trusted: bool) -> bool:
    """Is this a file that is fetched with the weights?"""
    return name in READ or travels(name, trusted=trusted)


def _is_template(name: str) -> bool:
    return Path(name).parent == Path(TEMPLATES) and name.endswith(".jinja")


def _is_small(name: str, nbytes: int) -> bool:
    return name in _SMALL_FILES and (nbytes <= _SMALL_BYTES or name == "config.json")


def _write_stand_in(file: Path, pieces: Mapping[int, bytes], nbytes: int) -> None:
    """A sparse file with some pieces of the real one, by their offset, and its size."""
    with file.open("wb") as stream:
        for offset, piece in pieces.items():
            stream.seek(offset)
            stream.write(piece)
        stream.flush()
        os.truncate(stream.fileno(), nbytes)
