from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxq.calibration.text import corpus_text, read_texts, sample_from, tokenize
from mlxq.errors import BadInputError
from tests.tiny import VOCABULARY, tiny_llama


class Characters:
    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(c) for c in text]


def test_rows_hold_inputs_and_what_follows() -> None:
    found = tokenize("abcdefghijkl", "t", Characters(), sequence_tokens=3)
    assert found.ids.shape == (3, 4)
    assert "".join(map(chr, found.ids[1])) == "efgh"
    assert found.info.tokens == 9


def test_a_limit_takes_rows_from_the_whole_text() -> None:
    found = tokenize("".join(map(chr, range(400))), "t", Characters(), sequence_tokens=3, limit=9)
    assert found.ids[:, 0].tolist() == [0, 200, 396]


def test_text_that_is_too_short_missing_empty_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="at least 20 are needed"):
        tokenize("short", "t", Characters(), sequence_tokens=9)
    with pytest.raises(BadInputError, match="cannot read"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(BadInputError, match="is empty"):
        read_texts([tmp_path / "empty.txt"])
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(BadInputError, match="not UTF-8"):
        read_texts([tmp_path / "binary.txt"])


def test_samples_depend_on_the_seed_alone() -> None:
    one, same, other = (
        sample_from(tiny_llama(), sequence_tokens=6, sequences=3, start_token=5, batch=2, seed=seed)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.ids, same.ids)
    assert one.info.sha256 == same.info.sha256 != other.info.sha256
    assert one.ids.shape == (3, 7)
    assert (one.ids[:, 0] == 5).all()
    assert one.ids.max() < VOCABULARY


def test_the_corpus_halves_differ() -> None:
    evaluation, calibration = corpus_text("evaluation"), corpus_text("calibration")
    lines = {line for line in evaluation.splitlines() if len(line) > 40}
    assert lines
    assert not lines & {line for line in calibration.splitlines() if len(line) > 40}
