"""A model on the Hub whose weights are still there."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path


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
    ``weights`` and ``companions`` (config, tokenizer, licence) are all of it. ``scratch`` holds the headers as sparse
    files, and the small companions.
    """

    repo: str
    revision: str
    commit: str
    weights: tuple[RemoteFile, ...]
    companions: tuple[RemoteFile, ...]
    scratch: Scratch

    @property
    def folder(self) -> Path:
        """The temporary folder."""
        return self.scratch.folder
