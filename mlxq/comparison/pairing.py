"""Two models on the same tokens: whether both can read them, and the ids that both have logits for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlxq.architecture.token_ids import check_ids, rows_of_model
from mlxq.calibration.text import TokenizedText
from mlxq.errors import BadInputError
from mlxq.metrics.evaluation import evaluation_model

if TYPE_CHECKING:
    import mlx.nn as nn


def logit_count(model: nn.Module) -> int:
    """Width of the logits; asks for their shape only, so nothing is computed."""
    import mlx.core as mx

    return int(model(mx.zeros((1, 1), dtype=mx.int32)).shape[-1])


def reads(text: TokenizedText, model: nn.Module, name: str) -> nn.Module:
    """``model`` as it is evaluated, whose embedding has a row for every token of ``text``; ``name`` is its own.

    Raises BadInputError where it has not.
    """
    model = evaluation_model(model)
    check_ids(text.ids, rows_of_model(model), f"{name}: the reference's tokenizer")
    return model


def check_predictable(text: TokenizedText, logits: int, name: str) -> None:
    """Refuse a text with an id that one of two models has no logit for: a head may be narrower than its embedding.

    ``logits`` are those that both give a token. Raises BadInputError.
    """
    if (last := int(text.ids.max())) >= logits:
        raise BadInputError(
            f"{name}: the text has token id {last}, and it and the reference share {logits} logits a token",
            "One of the two was cut to a smaller vocabulary: they cannot be compared on this text.",
        )


def padded_note(name: str, rows: int, reference_rows: int) -> str:
    """What a report says of a model whose logits are not as many as the reference's."""
    return (
        f"{name} has {rows:,} logits a token and the reference {reference_rows:,}: compared on the ids that both have, "
        f"below {min(rows, reference_rows):,}."
    )
