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
# Some six million tokens: a comparison takes minutes for a tenth of a million.
MAX_TEXT_BYTES = 25 << 20
_SEED = 0


@dataclass(frozen=True)
class TextInfo:
    """A text in a report: ``sha256`` of the UTF-8 text, or of the token ids (int32) of samples."""

    name: str
    sha256: str
    tokens: int
    sequence_tokens: int


@dataclass(frozen=True)
class TokenizedText:
    """``ids`` (sequences, sequence_tokens + 1) int32: each row holds inputs and, one on, what follows."""

    info: TextInfo
    ids: npt.NDArray[np.int32]


def corpus_text(half: str = "evaluation") -> str:
    """The shipped corpus' ``evaluation`` or ``calibration`` half: its files in order of name."""
    folder = resources.files("mlxq.calibration").joinpath("corpus", half)
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


def tokenize(text: str, name: str, tokenizer: Any, *, sequence_tokens: int, limit: int | None = None) -> TokenizedText:
    """Cut ``text`` into rows of ``sequence_tokens`` + 1 tokens; a rest that fills no row is left out.

    ``limit`` is the most tokens to predict: rows are then taken evenly from the whole text, so that each kind
    of text in it keeps its share. Raises BadInputError where the text has less than two rows.
    """
    import numpy as np

    # Without verbose=False, transformers warns that the whole text is longer than the model's context.
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=np.int32)
    width = sequence_tokens + 1
    rows = len(ids) // width
    if rows < 2:
        raise BadInputError(
            f"{name} has {len(ids)} tokens; at least {2 * width} are needed (two sequences of {width})",
            "Give a longer text, or shorter sequences.",
        )
    table = ids[: rows * width].reshape(rows, width)
    if limit is not None and limit < rows * sequence_tokens:
        kept = max(2, limit // sequence_tokens)
        table = table[np.linspace(0, rows - 1, kept).round().astype(int)]
    return _tokenized(name, text.encode(), table)


def sample_from(
    model: nn.Module,
    *,
    sequence_tokens: int,
    sequences: int,
    start_token: int,
    batch: int = 8,
    seed: int = _SEED,
) -> TokenizedText:
    """Sample sequences from ``model`` at temperature 1 with no truncation, each from ``start_token``.

    On text drawn from the reference itself, the mean KL per token estimates the KL divergence between the two
    models as distributions over texts (chain rule). ``batch`` sequences share each step, with a KV cache.
    """
    import mlx.core as mx
    import numpy as np

    vocabulary = rows_of_model(model)
    check_ids([start_token], vocabulary, "its start token")
    key = mx.random.key(seed)
    rows = []
    for begin in range(0, sequences, batch):
        count = min(batch, sequences - begin)
        cache = upstream.prompt_cache(model)
        last = mx.full((count, 1), start_token, dtype=mx.int32)
        drawn = [last]
        for _ in range(sequence_tokens):
            key, now = mx.random.split(key)
            logits = model(last, cache=cache)[:, -1].astype(mx.float32)
            # A head may be wider than the embedding; what only it has can't be read again.
            last = mx.random.categorical(logits[:, :vocabulary], key=now)[:, None].astype(mx.int32)
            mx.eval(last, [entry.state for entry in cache])
            drawn.append(last)
        rows.append(np.array(mx.concatenate(drawn, axis=1)))
    table = np.concatenate(rows).astype(np.int32)
    return _tokenized(f"{SELF} (seed {seed})", table.tobytes(), table)


def _tokenized(name: str, hashed: bytes, table: Any) -> TokenizedText:
    rows, width = table.shape
    info = TextInfo(name, hashlib.sha256(hashed).hexdigest(), rows * (width - 1), width - 1)
    return TokenizedText(info, table)
