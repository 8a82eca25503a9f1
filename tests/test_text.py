from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mlxq.calibration.text import Windows, corpus_text, read_texts, sample_from, sampling_start, start_tokens, tokenize
from mlxq.errors import BadInputError
from tests.tiny import VOCABULARY, tiny_llama


class Characters:
    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        return [ord(c) for c in text]


def test_rows_hold_inputs_and_what_follows() -> None:
    found = tokenize("abcdefghijkl", "t", Characters(), Windows(3))
    assert found.ids.shape == (3, 4)
    assert "".join(map(chr, found.ids[1])) == "efgh"
    assert found.info.tokens == 9


class Starting(Characters):
    """Adds ``start`` in front and 99 at the end, as a post-processor does."""

    eos_token_id = 98

    def __init__(self, *start: int, bos_token_id: int | None = None) -> None:
        self.start, self.bos_token_id = list(start), bos_token_id

    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        ids = super().encode(text)
        return [*self.start, *ids, 99] if add_special_tokens else ids


def test_start_tokens_are_those_that_the_tokenizer_adds_whatever_its_settings_name() -> None:
    assert start_tokens(Starting(1)) == (1,)
    assert start_tokens(Starting(1, 2)) == (1, 2)
    assert start_tokens(Starting(bos_token_id=7)) == ()
    assert sampling_start(Starting(1, bos_token_id=7)) == (1,)
    assert sampling_start(Starting(bos_token_id=0)) == (0,)
    assert sampling_start(Starting()) == (98,)
    without = Starting()
    without.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(BadInputError, match="neither a start nor an end token"):
        sampling_start(without)


@pytest.mark.parametrize("start", [(), (1,), (1, 2)])
def test_start_tokens_come_before_the_same_tokens_and_are_not_scored(start: tuple[int, ...]) -> None:
    text = "".join(map(chr, range(100, 190)))
    found = tokenize(text, "t", Starting(*start), Windows(8))
    plain = tokenize(text, "t", Characters(), Windows(8))
    assert found.info.start_tokens == start
    assert (found.ids[:, : len(start)] == start).all()
    np.testing.assert_array_equal(found.ids[:, len(start) :], plain.ids)
    assert (found.info.tokens, found.info.scored_tokens) == (80, 8)
    assert found.info.tokens == plain.info.tokens


@pytest.mark.parametrize("start", [(), (1,)])
def test_last_half_is_what_llama_cpp_scores(start: tuple[int, ...]) -> None:
    """Its loop: windows of the text with its start token, the first of each replaced by one, from n_ctx / 2 on."""
    text, n_ctx = "".join(map(chr, range(100, 190))), 8
    found = tokenize(text, "t", Starting(*start), Windows(n_ctx, last_half=True))
    tokens = [*start, *map(ord, text)]
    contexts, scored = [], []
    for begin in range(0, len(tokens) // n_ctx * n_ctx, n_ctx):
        window = [*start, *tokens[begin + len(start) : begin + n_ctx]]
        for j in range(n_ctx // 2, n_ctx - 1):
            contexts.append(window[: j + 1])
            scored.append(window[j + 1])
    ours = found.info.scored_tokens
    width = found.ids.shape[1]
    assert [int(t) for row in found.ids for t in row[-ours:]] == scored
    assert [row[: width - ours + k].tolist() for row in found.ids for k in range(ours)] == contexts
    assert found.info.tokens == len(scored)


def test_the_limit_counts_scored_tokens() -> None:
    text = "".join(map(chr, range(100, 1000)))
    assert tokenize(text, "t", Starting(1), Windows(8), limit=40).info.tokens == 40
    assert tokenize(text, "t", Starting(1), Windows(8, last_half=True), limit=40).info.tokens == 39


def test_ids_have_a_hash_of_their_own() -> None:
    text = "".join(map(chr, range(100, 190)))
    with_start, without = (tokenize(text, "t", Starting(*s), Windows(8)).info for s in ((1,), ()))
    assert with_start.sha256 == without.sha256
    assert with_start.ids_sha256 != without.ids_sha256


def test_samples_begin_with_all_start_tokens() -> None:
    found = sample_from(tiny_llama(), Windows(6), (5, 7), tokens=18)
    assert found.ids.shape == (3, 8)
    assert (found.ids[:, :2] == [5, 7]).all()
    assert (found.info.tokens, found.info.start_tokens) == (18, (5, 7))
    half = sample_from(tiny_llama(), Windows(6, last_half=True), (5, 7), tokens=6)
    assert (half.ids.shape, half.info.tokens) == ((3, 6), 6)


def test_a_limit_takes_rows_from_the_whole_text() -> None:
    found = tokenize("".join(map(chr, range(400))), "t", Characters(), Windows(3), limit=9)
    assert found.ids[:, 0].tolist() == [0, 200, 396]


def test_text_that_is_too_short_missing_empty_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="at least 20 are needed"):
        tokenize("short", "t", Characters(), Windows(9))
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
        sample_from(tiny_llama(), Windows(6), (5,), tokens=18, batch=2, seed=seed) for seed in (0, 0, 1)
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
