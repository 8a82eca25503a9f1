"""A model read through for numbers that are none: NaN and infinity, in every tensor of floats that its files hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlxq.arrays import NOT_FINITE, nan_and_infinity, rows_finite
from mlxq.sources.base import ModelSource
from mlxq.tensors import TensorSpec

# Bytes of a tensor, as numbers, that are in memory at a time.
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Read:
    """How far it is: bytes as numbers read of all to read, and the tensor just finished, if one was."""

    done_bytes: int
    total_bytes: int
    finished: str | None


@dataclass(frozen=True)
class Unsound:
    """A tensor with ``nan`` numbers that are NaN and ``infinite`` that are infinite; ``first_row`` counts from 0."""

    tensor: str
    nan: int
    infinite: int
    first_row: int

    def __str__(self) -> str:
        """In one clause."""
        held = [f"{count:,} {what}" for count, what in ((self.nan, "NaN"), (self.infinite, "infinite")) if count]
        return f"{self.tensor} holds {' and '.join(held)}, the first in row {self.first_row:,}"


def row_blocks(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in blocks of at most ``BLOCK_BYTES``: (start, stop)."""
    rows = max(spec.rows, 1)
    per_block = max(1, BLOCK_BYTES // max(1, spec.nbytes // rows))
    for start in range(0, rows, per_block):
        yield start, min(start + per_block, rows)


def read_through(source: ModelSource, codes: Mapping[str, int] | None = None) -> Iterator[Read | Unsound]:
    """Read every tensor of floats block by block, and yield progress and those that hold no finite numbers.

    ``codes`` names tensors of uint8 codes that stand for floats, each with its largest code that is a number.
    """
    codes = codes or {}
    specs = [s for s in source.tensors.values() if s.size and (s.dtype in NOT_FINITE or s.name in codes)]
    total, done = sum(spec.nbytes for spec in specs), 0
    for spec in specs:
        nan = infinite = 0
        first = None
        for start, stop in row_blocks(spec):
            rows = source.read_rows(spec.name, start, stop)
            done += rows.nbytes
            if spec.name in codes:
                wrong, endless = rows > codes[spec.name], rows < 0
            elif rows_finite(rows, spec.dtype):
                yield Read(done, total, None)
                continue
            else:
                wrong, endless = nan_and_infinity(rows, spec.dtype)
            nan, infinite = nan + int(wrong.sum()), infinite + int(endless.sum())
            if first is None and (wrong | endless).any():
                first = start + int((wrong | endless).any(-1).argmax())
            yield Read(done, total, None)
        if first is not None:
            yield Unsound(spec.name, nan, infinite, first)
        yield Read(done, total, spec.name)
