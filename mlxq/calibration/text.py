"""The text that models are compared on: the shipped corpus, files, or samples of the reference itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq import upstream
from mlxq.architecture.token_ids import check_ids, rows_of_model
from mlxq.errors import BadInputError
from mlxq.reading import read_text

if TYPE_CHECKING:
    import mlx.nn as nn
    import numpy as np
    import numpy.typing as npt

SELF = "self"
# The usual length of a sequence.
WINDOW_TOKENS = 256
# Some six million tokens: a comparison takes minutes for a tenth of a million.
MAX_TEXT_BYTES = 25 << 20
_SEED = 0


@dataclass(frozen=True)
class TextInfo:
    """A text in a report: ``sha256`` of the UTF-8 text, or of the token ids of samples.

    ``tokens`` are scored: the last ``scored_tokens`` predictions of each sequence, cut by ``sequence_tokens``.
    ``start_tokens`` are the ids that every sequence begins with, empty where it begins with text. ``ids_sha256`` is
    the hash of all ids (int32), start tokens included.
    """

    name: str
    sha256: str
    ids_sha256: str
    tokens: int
    sequence_tokens: int
    scored_tokens: int
    start_tokens: tuple[int, ...]

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "start_tokens": list(self.start_tokens)}

    def windows_in_words(self) -> str:
        """One sentence: how the text was cut, what each sequence begins with, and how many predictions of it count."""
        ids = ", ".join(map(str, self.start_tokens))
        begun = f"each begun by the tokenizer's start token (id {ids})" if ids else "without a start token"
        return (
            f"Sequences of {self.sequence_tokens} tokens, {begun}; "
            f"the last {self.scored_tokens} predictions of each are scored."
        )


@dataclass(frozen=True)
class TokenizedText:
    """``ids`` (sequences, width) int32: each row holds inputs and, one on, what follows; its last are scored."""

    info: TextInfo
    ids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Windows:
    """How a text is cut into sequences, and what is scored of each.

    Usually ``sequence_tokens`` are predicted in a sequence, each from all tokens before it. The first token of its text
    is only read, so that the same tokens are predicted with start tokens in front and without. With ``last_half``, the
    windows of llama.cpp's ``perplexity`` (its ``n_ctx`` is ``sequence_tokens``): the start tokens *replace* the first
    of each, and what is scored is its second half.
    """

    sequence_tokens: int = WINDOW_TOKENS
    last_half: bool = False

    @property
    def scored_tokens(self) -> int:
        """Predictions scored of each sequence, its last ones."""
        return self.sequence_tokens - 1 - self.sequence_tokens // 2 if self.last_half else self.sequence_tokens

    @property
    def text_tokens(self) -> int:
        """Tokens of the text from the beginning of one sequence to that of the next."""
        return self.sequence_tokens if self.last_half else self.sequence_tokens + 1

    def cut(self, ids: npt.NDArray[np.int32], start: Sequence[int]) -> npt.NDArray[np.int32]:
        """The ids of a text (tokens,) as rows (sequences, width), each begun by ``start``; the rest is left out."""
        import numpy as np

        front = np.asarray(start, np.int32)
        if self.last_half:
            ids = np.concatenate([front, ids])
        count = len(ids) // self.text_tokens
        rows = ids[: count * self.text_tokens].reshape(count, self.text_tokens)
        begun = rows[:, len(front) :] if self.last_half else rows
        return np.concatenate([np.tile(front, (count, 1)), begun], axis=1)


def start_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that ``tokenizer`` puts in front of a text: what the model sees before each, in use as in training.

    Asked of the tokenizer at work: its settings may name a start token that it never adds (Qwen), and its
    post-processor may add one, or two (GLM), that no setting names. What it adds at the end is not one.
    """
    text = "a"
    full = tuple(tokenizer.encode(text))
    plain = tuple(tokenizer.encode(text, add_special_tokens=False))
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return full[:at]
    return ()


def sampling_start(tokenizer: Any) -> tuple[int, ...]:
    """What samples of a model begin with: its start tokens, or the token that ends or begins a text where it adds none.

    Raises BadInputError where the tokenizer names neither.
    """
    if found := start_tokens(tokenizer):
        return found
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return (int(token),)
    raise BadInputError(
        "text cannot be sampled from the model: its tokenizer has neither a start nor an end token",
        "Give files of text.",
    )


def corpus_text(half: str = "evaluation") -> str:
    """The shipped corpus' ``evaluation`` or ``calibration`` half: its files in order of name."""
    folder = resources.files("mlxq.calibration").joinpath("corpus").joinpath(half)
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return "\n\n".join(f.read_text(encoding="utf-8") for f in files)


def read_texts(files: Sequence[Path]) -> str:
    """The files' text, joined. Raises BadInputError for one that is missing, empty, too large or not UTF-8."""
    texts = []
    for file in files:
        text = read_text(file, MAX_TEXT_BYTES)
        if not text.strip():
            raise BadInputError(f"{file} is empty", "Give a file with a few thousand words.")
        texts.append(text)
    return "\n\n".join(texts)


def tokenize(text: str, name: str, tokenizer: Any, windows: Windows, *, limit: int | None = None) -> TokenizedText:
    """Cut ``text`` as ``windows`` says, each row begun by the tokenizer's start tokens.

    ``limit`` is the most tokens to score: rows are then taken evenly from the whole text, so that each kind of text in
    it keeps its share. Raises BadInputError where the text has less than two rows.
    """
    import numpy as np

    # Without verbose=False, transformers warns that the whole text is longer than the model's context.
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int32)
    start = start_tokens(tokenizer)
    table = windows.cut(ids, start)
    rows, width, scored = len(table), windows.text_tokens, windows.scored_tokens
    if rows < 2:
        raise BadInputError(
            f"{name} has {len(ids)} tokens; at least {2 * width} are needed (two sequences of {width})",
            "Give a longer text, or shorter sequences.",
        )
    if limit is not None and limit < rows * scored:
        kept = max(2, limit // scored)
        table = table[np.linspace(0, rows - 1, kept).round().astype(int)]
    return _tokenized(name, text.encode(), table, windows, start)


def sample_from(
    model: nn.Module,
    windows: Windows,
    start: Sequence[int],
    *,
    tokens: int,
    batch: int = 8,
    seed: int = _SEED,
) -> TokenizedText:
    """Sample sequences from ``model`` at temperature 1 with no truncation, each begun by the ids ``start``.

    ``tokens`` is how many to score, in two sequences at least. On text drawn from the reference itself, the mean KL per
    token estimates the KL divergence between the two models as distributions over texts (chain rule). ``batch``
    sequences share each step, with a KV cache. Raises BadInputError for start tokens past the embedding.
    """
    import mlx.core as mx
    import numpy as np

    vocabulary = rows_of_model(model)
    check_ids(start, vocabulary, "its start token")
    sequences = max(2, tokens // windows.scored_tokens)
    key = mx.random.key(seed)
    rows = []
    for begin in range(0, sequences, batch):
        count = min(batch, sequences - begin)
        cache = upstream.prompt_cache(model)
        last = mx.array([list(start)] * count, dtype=mx.int32)
        drawn = [last]
        for _ in range(windows.sequence_tokens - len(start) if windows.last_half else windows.sequence_tokens):
            key, now = mx.random.split(key)
            logits = model(last, cache=cache)[:, -1].astype(mx.float32)
            # A head may be wider than the embedding; what only it has can't be read again.
            last = mx.random.categorical(logits[:, :vocabulary], key=now)[:, None].astype(mx.int32)
            mx.eval(last, [entry.state for entry in cache])
            drawn.append(last)
        rows.append(np.array(mx.concatenate(drawn, axis=1)))
    table = np.concatenate(rows).astype(np.int32)
    return _tokenized(f"{SELF} (seed {seed})", table.tobytes(), table, windows, start)


def _tokenized(name: str, hashed: bytes, table: Any, windows: Windows, start: Sequence[int]) -> TokenizedText:
    info = TextInfo(
        name=name,
        sha256=hashlib.sha256(hashed).hexdigest(),
        ids_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
        tokens=len(table) * windows.scored_tokens,
        sequence_tokens=windows.sequence_tokens,
        scored_tokens=windows.scored_tokens,
        start_tokens=tuple(start),
    )
    return TokenizedText(info, table)
