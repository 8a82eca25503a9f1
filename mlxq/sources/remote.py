"""A model of the Hugging Face Hub as a value: what was named, which files make it up, and where they wait."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[\w./ +-]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Reference:
    """``org/name[/file.gguf][@revision]``, taken apart."""

    repo: str
    file: str | None
    revision: str | None


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository."""

    name: str
    nbytes: int


class Scratch:
    """A temporary folder that goes when nothing refers to it any more."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mlxq-hub-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True)
class HubModel:
    """Where a model's weights still are, and what of the repository is needed.

    ``revision`` is as it was named, ``commit`` what it means.
    ``weights`` and ``companions`` (config, tokenizer, licence) are all of it; ``not_taken`` is what else
    the repository holds, and why it is left there. ``trusted`` says
    that its own Python files may run. ``scratch`` holds the headers as sparse files, and the small companions.
    """

    repo: str
    revision: str
    commit: str
    weights: tuple[RemoteFile, ...]
    companions: tuple[RemoteFile, ...]
    not_taken: Mapping[str, str]
    trusted: bool
    scratch: Scratch

    @property
    def folder(self) -> Path:
        """The temporary folder."""
        return self.scratch.folder


def parse_reference(text: str) -> Reference | None:
    """Take ``org/name[/file.gguf][@revision]`` apart; None where it is nothing of the kind."""
    found = _REFERENCE.fullmatch(text)
    if found is None or text.startswith(("./", "../", "~/")):
        return None
    return Reference(found["repo"], found["file"], found["revision"])
