"""Token ids held against the rows of the embedding: MLX looks rows up unchecked, and past them lies other memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import BadInputError
from mlxq.files import refuse_pointer

if TYPE_CHECKING:
    from mlxq.architecture.bind import Architecture


@dataclass(frozen=True)
class PastRows:
    """Tokens of a tokenizer that the embedding has no row for.

    ``special`` are added tokens that only control text spells out (a text model keeps its sibling's image token);
    ``ordinary`` any others, which plain text can come to.
    """

    special: Mapping[str, int]
    ordinary: Mapping[str, int]
    rows: int

    def __str__(self) -> str:
        """In one clause, those that text can come to first."""
        found = self.ordinary or self.special
        token, first = min(found.items(), key=lambda item: item[1])
        more = f", and {len(found) - 1:,} more" if len(found) > 1 else ""
        return f"token {token!r} has id {first:,}{more}, and the model's embedding has {self.rows:,} rows"


def rows_of(architecture: Architecture) -> int | None:
    """Rows of the largest embedding of a model, None where it has none: token ids lie below."""
    rows = [module.shape[0] for module in architecture.modules if "Embedding" in module.kind]
    return max(rows, default=None)


def rows_of_model(model: Any) -> int | None:
    """As ``rows_of``, of an opened MLX model."""
    from mlx.utils import tree_flatten

    leaves = tree_flatten(model.leaf_modules(), is_leaf=lambda node: hasattr(node, "parameters"))
    rows = [int(leaf.weight.shape[0]) for _, leaf in leaves if "Embedding" in type(leaf).__name__ and "weight" in leaf]
    return max(rows, default=None)


def check_ids(ids: Any, rows: int | None, whose: str) -> None:
    """Refuse token ids, an array or a list, that the embedding has no row for; ``whose`` they are begins the error.

    Everything that feeds a model tokens asks this first. Raises BadInputError.
    """
    import numpy as np

    numbers = np.asarray(ids)
    if rows is None or not numbers.size:
        return
    wrong = numbers[(numbers < 0) | (numbers >= rows)]
    if wrong.size:
        raise BadInputError(
            f"{whose} gives token id {int(wrong.max())}, and the model's embedding has {rows} rows",
            "Its tokenizer belongs to another model, or lacks a step of its own: fetch the model again.",
        )


def past_rows(sidecars: Mapping[str, Path | bytes], rows: int | None) -> PastRows | None:
    """Tokens of ``tokenizer.json`` whose ids are past the embedding, or None; None too where there is no such file.

    Raises BadInputError where it is no JSON.
    """
    content = sidecars.get("tokenizer.json")
    if content is None or rows is None:
        return None
    raw = content if isinstance(content, bytes) else content.read_bytes()
    refuse_pointer("tokenizer.json", raw)
    try:
        data = json.loads(raw)
        vocabulary = (data.get("model") or {}).get("vocab") or {}
        listed = enumerate(entry[0] for entry in vocabulary) if isinstance(vocabulary, list) else ()
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {token: number for number, token in listed}
        special = set()
        for token in data.get("added_tokens") or ():
            ids[token["content"]] = token["id"]
            if token.get("special"):
                special.add(token["content"])
        return sorted_out(ids, special, rows)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as exc:
        raise BadInputError(
            "tokenizer.json is not a tokenizer's JSON", "Download the file again, or leave it out."
        ) from exc


def sorted_out(ids: Mapping[str, int], special: Collection[str], rows: int | None) -> PastRows | None:
    """Of a tokenizer's tokens and their ``ids``, those past the embedding; None where there are none."""
    if rows is None:
        return None
    past = {token: number for token, number in ids.items() if number >= rows}
    if not past:
        return None
    controls = {token: number for token, number in past.items() if token in special}
    return PastRows(controls, {token: number for token, number in past.items() if token not in special}, rows)
