"""Shards are hashed and brought to the disk behind the writers: what is recorded is what the files hold."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxq.arrays import all_finite, to_mlx
from mlxq.errors import MlxqError
from mlxq.files import sha256_file
from mlxq.pipeline import Finished, Resumed, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import load_recipe
from mlxq.sources.resolve import resolve
from mlxq.writing import trailing
from mlxq.writing.execute import Written
from mlxq.writing.folder import PartialFolder
from tests.checkpoints import llama


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return prepare(load_recipe("4bit"), resolve(str(llama(tmp_path / "model"))))


def test_the_hash_is_of_what_the_file_holds_and_not_of_what_was_to_be_written(plan: Plan, tmp_path: Path) -> None:
    (shard,) = plan.shards
    with PartialFolder(plan, tmp_path / "out") as partial:
        # The steps are finished out of order, and a byte of the second tensor is damaged on its way.
        damaged = sorted(shard.offsets.values())[1]
        with (partial.folder / shard.file).open("r+b", buffering=0) as file:
            file.seek(damaged)
            file.write(b"\xff")
        for step in reversed(plan.steps):
            partial.finished(step.path)
        recorded = partial.shard_sha256()
        assert recorded == {shard.file: sha256_file(partial.folder / shard.file)}


def test_what_is_read_back_and_synced_in_pieces_is_hashed_whole(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trailing, "READ_BYTES", 1000)
    monkeypatch.setattr(trailing, "SYNC_BYTES", 3000)
    events = run(plan, tmp_path / "out")
    finished = 0
    for event in events:
        finished += isinstance(event, Written) and event.finished is not None
        if finished == 5:
            break
    events.close()
    resumed, *_, last = run(plan, tmp_path / "out")
    assert isinstance(resumed, Resumed)
    assert isinstance(last, Finished)
    for name, facts in last.report["files"].items():
        assert facts["sha256"] == sha256_file(tmp_path / "out" / name)


def test_where_the_disk_loses_bytes_nothing_of_the_journal_is_relied_on(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = plan.shards
    fsync = os.fsync

    def lost(descriptor: int) -> None:
        if os.fstat(descriptor).st_size == shard.nbytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", lost)
        with pytest.raises(MlxqError, match="did not take what was written") as caught:
            list(run(plan, tmp_path / "out"))
    assert "starts afresh" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    first, *_ = run(plan, tmp_path / "out")
    assert isinstance(first, Resumed)
    assert (first.step_count, first.discarded) == (0, "a journal that cannot be relied on")
    report = json.loads((tmp_path / "out" / "mlxq.json").read_text())
    assert all(facts["sha256"] == sha256_file(tmp_path / "out" / name) for name, facts in report["files"].items())


@pytest.mark.parametrize(("dtype", "bits"), [("BF16", 0x7F80), ("F16", 0x7C00)])
def test_every_number_of_16_bits_is_told_from_what_is_none(dtype: str, bits: int) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    stored = patterns if dtype == "BF16" else patterns.view(np.float16)
    infinite_or_nan = patterns & bits == bits
    assert all_finite(to_mlx(stored[~infinite_or_nan], dtype)).item()
    told = [all_finite(to_mlx(stored[i : i + 1], dtype)) for i in np.flatnonzero(infinite_or_nan)]
    mx.eval(told)
    assert not any(finite.item() for finite in told)


def test_numbers_of_32_bits_are_told_from_what_is_none() -> None:
    largest = float(np.finfo(np.float32).max)
    assert all_finite(mx.array([0.0, -0.0, 1e-45, largest, -largest])).item()
    for pattern in (0x7F80_0000, 0xFF80_0000, 0x7F80_0001, 0xFFFF_FFFF, 0x7FC0_0000):
        assert not all_finite(mx.array(np.array([pattern, 1], np.uint32).view(np.float32))).item()
