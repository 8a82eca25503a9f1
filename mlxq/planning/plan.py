"""What a plan is: every decision and every byte, known before a weight is read, and complete when it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxq.architecture.bind import Architecture
from mlxq.methods.formats import Format
from mlxq.recipe.model import Calibration, Recipe
from mlxq.shown import Shown
from mlxq.sources.base import ModelSource
from mlxq.sources.belongings import described
from mlxq.tensors import TensorSpec


class Stored(Enum):
    """What becomes of modules that the source holds quantized."""

    AS_IS = "as_is"
    """They stay as they are, where MLX reads their format."""
    REQUANTIZE = "requantize"
    """They are read as numbers, and stored as the recipe says."""
    DEQUANTIZE = "dequantize"
    """They are read as numbers, and written so."""
    CARRY_OVER = "keep_quantization"
    """GGUF blocks are carried over bit for bit, where an MLX format holds the same values."""

    @classmethod
    def recorded(cls, options: Mapping[str, bool]) -> Stored:
        """The one that the ``options`` of an ``mlxq.json`` name."""
        return next((each for each in cls if options.get(each.value)), cls.AS_IS)

    @property
    def opened(self) -> bool:
        """Whether what is stored quantized is read as numbers."""
        return self in (Stored.REQUANTIZE, Stored.DEQUANTIZE)


class By(Enum):
    """Who decides what becomes of a module; the value is what tables and ``mlxq.json`` say."""

    DEFAULT = "default"
    RULE = "rule"
    BUDGET = "budget"
    MODEL = "the model asks for it"
    SOURCE = "as stored in the source"
    BLOCKS = "same blocks as the source"
    NUMBERS = "stored as numbers"


@dataclass(frozen=True)
class Decision:
    """What becomes of one module, and why.

    ``format`` None means it stays in ``dtype``. ``by`` says who decided, ``where`` the file and line of a rule that
    did. ``also`` are the rules that matched too; ``asked`` what the model said of it; ``note`` what had to be changed
    (a group size that does not divide the width, a tied head); ``misfit`` whether it was the width; ``method`` the
    name of how its numbers are chosen, ``guided`` whether calibration text has a say in it; ``nbytes`` what all that
    stores its weight takes.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    format: Format | None
    quantizable: bool
    by: By
    where: str | None
    also: tuple[str, ...]
    asked: str | None
    note: str | None
    misfit: bool
    method: str
    guided: bool
    nbytes: int

    @property
    def decided_by(self) -> str:
        """Who decided, as people read it: a rule by its file and line."""
        return self.where or self.by.value


@dataclass(frozen=True)
class Step:
    """Read one weight, cast it to ``dtype``, encode it, write ``outputs``.

    ``source`` is the checkpoint tensor it is, or None where it must be assembled by ``mlx_lm``'s sanitize.
    ``dequantize`` says that the parameter is stored quantized and is read as numbers; ``repacked`` that its stored
    blocks are carried over bit for bit into an MLX format that holds the same values. ``method`` is how its numbers
    are chosen, ``guided`` that calibration text has a say in it.
    """

    path: str
    spec: TensorSpec
    source: str | None
    format: Format | None
    dequantize: bool
    repacked: bool
    outputs: tuple[TensorSpec, ...]
    method: str = "rtn"
    guided: bool = False


@dataclass(frozen=True)
class Shard:
    """One output file: its header as bytes, and where each tensor's bytes go (absolute offsets)."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Spent:
    """What a budget came to: a format for each module it decides (None keeps it in its dtype), and how, as data."""

    formats: Mapping[str, Format | None]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Plan(Shown):
    """Everything that will be written.

    ``recipe`` is what the person wrote, ``stored`` what they want of modules that are quantized already.
    ``uncalibrated`` says why its calibration cannot be used, None where it can be, or is not asked for. ``spending``
    is how the budget was spent, as data; None without one.
    """

    source: ModelSource
    recipe: Recipe
    stored: Stored
    architecture: Architecture
    decisions: tuple[Decision, ...]
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    parameter_count: int
    uncalibrated: str | None
    spending: Mapping[str, Any] | None

    @cached_property
    def by_path(self) -> Mapping[str, Decision]:
        """Every decision by the path of its module."""
        return {decision.path: decision for decision in self.decisions}

    @property
    def options(self) -> dict[str, bool]:
        """What the command line said of the source, as ``mlxq.json`` records it."""
        asked = {each.value: each is self.stored for each in Stored if each is not Stored.AS_IS}
        return {**asked, "trust_remote_code": self.source.trusted}

    @property
    def calibration(self) -> Calibration:
        """The text that is really used: the recipe's, and none where it cannot be."""
        return self.recipe.calibration if self.uncalibrated is None else Calibration(("none",))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a person should know of the plan as a whole."""
        found = list(map(str, self.architecture.left_out))
        if self.uncalibrated is not None:
            found.append(f"calibration cannot follow this model ({self.uncalibrated}), so weights alone decide")
        if (fault := self.source.card.fault) is not None:
            found.append(fault)
        return tuple(found)

    def with_source(self, source: ModelSource) -> Plan:
        """The same plan on the same model once its weights are here: ``source`` differs only in where they lie."""
        return replace(self, source=source)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors written, headers not counted."""
        return sum(spec.nbytes for step in self.steps for spec in step.outputs)

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over the logical parameter count."""
        return self.weight_bytes * 8 / self.parameter_count

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before it runs, one line each."""
        return (
            *self.remarks,
            *described(self.source.left_behind),
            *(f"{d.path}: {d.note}" for d in self.decisions if d.note),
        )

    def fingerprint(self) -> str:
        """SHA-256 over all that determines the bytes written: headers, sources, casts and formats."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + shard.header)
        for step in self.steps:
            digest.update(
                f"{step.path} {step.spec} {step.source} {step.format} {step.dequantize} {step.repacked} "
                f"{step.method} {step.guided}\n".encode()
            )
        if any(step.guided for step in self.steps):
            digest.update(f"{self.calibration}\n".encode())
            for text in self.calibration.texts:
                if (file := Path(text)).is_file():
                    digest.update(file.read_bytes())
        digest.update(json.dumps(dict(self.source.config), sort_keys=True, default=str).encode())
        for file in self.source.weight_files:
            if self.source.revision is not None:
                # A commit names the bytes, wherever and whenever they are fetched.
                digest.update(f"{self.source.revision} {file.name}\n".encode())
            else:
                digest.update(f"{file.name} {self.source.as_opened[file]}\n".encode())
        return digest.hexdigest()
