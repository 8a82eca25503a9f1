"""What was measured is kept, and what is ours and damaged is made afresh."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxq.calibration.cache import ScoreCache
from mlxq.cli.keeping import write_or_keep
from mlxq.errors import BadInputError, MlxqError
from mlxq.files import check_writable, write_whole
from mlxq.methods.formats import Format
from mlxq.reading import read_bytes


def test_what_a_full_disk_does_not_take_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlxqError) as failed:
        write_or_keep(Path("/dev/full"), b"an hour of work")
    assert "No space left" in failed.value.message
    [kept] = tmp_path.iterdir()
    assert str(kept) in str(failed.value.hint)
    assert kept.read_bytes() == b"an hour of work"


def test_a_file_is_replaced_whole_through_its_link(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(b"old")
    (tmp_path / "link").symlink_to("page")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"page": b"new", "link": b"new"}


@pytest.mark.parametrize("name", [".", "nowhere/page.html", "file/page.html", "a" * 300])
def test_a_path_that_cannot_be_written_is_said_beforehand(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # A name that is too long is found by asking whether it is there.
    with pytest.raises(BadInputError, match="cannot write"):
        check_writable(tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("spoilt", ["key.json", "key.npz"])
@pytest.mark.parametrize("content", [b"", b"[]]", b'{"a": 1}', b'[{"path": "x", "format": 3}]', b"PK\x03\x04"])
def test_a_damaged_score_cache_is_made_afresh_and_said(
    spoilt: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path))
    first = ScoreCache("key")
    assert first.remark is None
    first.scores["model.layers.0", Format(4, 64)] = 0.5
    assert first.save() is None
    assert ScoreCache("key").scores == first.scores
    (tmp_path / "scores" / spoilt).write_bytes(content)
    again = ScoreCache("key")
    assert again.scores == {}
    assert "damaged" in str(again.remark)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "file"))
    cache = ScoreCache("key")
    assert "not kept" in str(cache.remark)
    assert cache.save() is None


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(BadInputError, match="5 bytes, and at most 4"):
        read_bytes(tmp_path / "file", 4)
