"""The tokens that calibration runs on, and those held out from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.architecture.token_ids import check_ids, rows_of
from mlxq.architecture.tokenizer import source_tokenizer
from mlxq.calibration.streamed import StreamedModel
from mlxq.calibration.text import (
    SELF,
    TextInfo,
    TokenizedText,
    Windows,
    corpus_text,
    read_texts,
    sample_from,
    sampling_start,
    start_tokens,
    tokenize,
)
from mlxq.errors import BadInputError
from mlxq.recipe.model import Calibration
from mlxq.sources.base import ModelSource

if TYPE_CHECKING:
    import mlx.core as mx

SEQUENCE_TOKENS = 512
# Sequences that pass through a block together.
BATCH_SEQUENCES = 2
# Every so many sequences one is held out, up to a number of tokens: choices are checked on text not chosen by.
HOLD_OUT_EVERY = 6
HELD_OUT_TOKENS = 4096


@dataclass(frozen=True)
class CalibrationText:
    """``batches`` (sequences, SEQUENCE_TOKENS) to calibrate on and ``held_out`` to check on; ``info`` names both."""

    info: TextInfo
    batches: tuple[mx.array, ...]
    held_out: tuple[mx.array, ...]


def calibration_text(calibration: Calibration, streamed: StreamedModel) -> CalibrationText:
    """The text that ``calibration`` names, in tokens of the model's tokenizer.

    Raises BadInputError for a text that is missing or too short.
    """
    text = _text(calibration, streamed, _tokenizer_of(streamed.source))
    check_ids(text.ids, rows_of(streamed.architecture), f"{streamed.source.name}: its tokenizer")
    ids = text.ids
    held_rows = min(len(ids) // HOLD_OUT_EVERY, HELD_OUT_TOKENS // SEQUENCE_TOKENS)
    held = {i * HOLD_OUT_EVERY + HOLD_OUT_EVERY - 1 for i in range(held_rows)} or {len(ids) - 1}
    kept = [i for i in range(len(ids)) if i not in held][: max(1, calibration.tokens // SEQUENCE_TOKENS)]
    return CalibrationText(text.info, _batches(ids[kept]), _batches(ids[sorted(held)]))


def _batches(rows: Any) -> tuple[mx.array, ...]:
    import mlx.core as mx

    return tuple(mx.array(rows[i : i + BATCH_SEQUENCES]) for i in range(0, len(rows), BATCH_SEQUENCES))


def _text(calibration: Calibration, streamed: StreamedModel, tokenizer: Any) -> TokenizedText:
    limit = calibration.tokens + HELD_OUT_TOKENS
    if calibration.texts == (SELF,):
        start = sampling_start(tokenizer)
        with streamed.hold_all():
            return sample_from(streamed.sequence.model, Windows(SEQUENCE_TOKENS - len(start)), start, tokens=limit)
    if calibration.texts == ("builtin",):
        text, name = corpus_text("calibration"), "shipped corpus (calibration)"
    else:
        files = [Path(text) for text in calibration.texts]
        text, name = read_texts(files), ", ".join(file.name for file in files)
    # A row has a token more than it predicts, and the start tokens: SEQUENCE_TOKENS with them.
    windows = Windows(SEQUENCE_TOKENS - 1 - len(start_tokens(tokenizer)))
    return tokenize(text, name, tokenizer, windows, limit=limit)


def _tokenizer_of(source: ModelSource) -> Any:
    """The source's tokenizer. Raises BadInputError where it has none that opens."""
    try:
        return source_tokenizer(source, f"{source.name}: its")
    except BadInputError as exc:
        raise BadInputError(
            f"{exc.message}; calibration needs it",
            exc.hint or "Add its tokenizer files, or calibrate from the weights alone: calibration: {text: none}.",
        ) from exc
