"""What a checkpoint holds that the MLX model does not, so that nothing is left out in silence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mlxq.families import HEADS, PREDICTION_HEAD, part_of
from mlxq.recipe.match import layer_index
from mlxq.tensors import TensorSpec


@dataclass(frozen=True)
class LeftOut:
    """One part of the source that reaches no output: ``label`` for people, ``tensors`` how many, ``nbytes`` stored.

    ``example`` is the name of one of its tensors. ``ability``: without it the model can do less than its source.
    """

    label: str
    tensors: int
    nbytes: int
    example: str
    ability: bool

    def __str__(self) -> str:
        count = "1 tensor" if self.tensors == 1 else f"{self.tensors:,} tensors"
        size = f"{count}, {self.nbytes / 1e6:,.1f} MB, such as {self.example}"
        lost = "; what is written reads and writes text only" if self.ability else ""
        return f"left out: {self.label} ({size}){lost}"


def left_out(
    checkpoint: Mapping[str, TensorSpec], parameters: Collection[str], taken: Collection[str], layer_count: int
) -> tuple[LeftOut, ...]:
    """The parts of ``checkpoint`` of which the model has no parameter.

    ``parameters`` are the model's, ``taken`` the tensors that became one as they are. A tensor of the language model
    that is neither may have been assembled into one; those of other parts, of layers behind the last, and of a head
    where the embedding is the head, cannot have been.
    """
    parts = {part_of(path) for path in parameters}
    layers = {layer_index(path) for path in parameters}
    has_head = any(_is_head(path) for path in parameters)
    found: dict[tuple[str, bool], list[TensorSpec]] = {}
    for name in sorted(checkpoint.keys() - set(taken)):
        part, layer = part_of(name), layer_index(name)
        if part is not None and part not in parts:
            found.setdefault((part.label, part.ability), []).append(checkpoint[name])
        elif part is None and layer is not None and layer >= layer_count and layer not in layers:
            found.setdefault((PREDICTION_HEAD.label, PREDICTION_HEAD.ability), []).append(checkpoint[name])
        elif part is None and _is_head(name) and not has_head:
            found.setdefault(("head of its own, as the embedding is the head", False), []).append(checkpoint[name])
    return tuple(
        LeftOut(label, len(specs), sum(spec.nbytes for spec in specs), specs[0].name, ability)
        for (label, ability), specs in found.items()
    )


def _is_head(name: str) -> bool:
    """Whether a tensor is of a head outside the layers."""
    return layer_index(name) is None and not HEADS.isdisjoint(name.split(".")[-2:])
