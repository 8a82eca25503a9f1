"""The reference over a text: run once, and kept as hidden states and a head instead of a model."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from mlxq.machine.cores import run_rows

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


def find_body(model: nn.Module) -> tuple[nn.Module, str] | None:
    """Where the decoder layers hang: (parent, name of the child that holds ``model.layers``), or None.

    What the parent does after calling that child is the head: projection to the vocabulary, scaling, capping.
    """
    import mlx.nn as nn

    layers = getattr(model, "layers", None)
    if not layers:
        return None
    modules = dict(model.named_modules())
    for path, module in modules.items():
        held = (child for child in module.values() if isinstance(child, list))
        if path and any(child and child[0] is layers[0] for child in held):
            parent, _, name = path.rpartition(".")
            return (modules[parent], name) if isinstance(modules.get(parent), nn.Module) else None
    return None


@functools.cache
def _stored_body() -> type:
    import mlx.nn as nn

    class StoredBody(nn.Module):  # type: ignore[misc]
        """Stands where the decoder was and answers with final hidden states computed earlier.

        Keeps the body's other children, as a tied head multiplies by the embedding.
        """

        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            for name, child in body.items():
                if not isinstance(child, list):
                    self[name] = child
            for name, value in vars(body).items():
                if not name.startswith("_"):
                    setattr(self, name, value)
            self._answers: list[Any] = []

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._answers[0]

    return StoredBody


class Reference:
    """The reference over the text: its final hidden states, and its head to turn them into logits.

    After ``build`` the decoder's weights are gone: what stays is one fp32 vector per token and the head.
    ``hidden`` is None where the model cannot be split; then the whole model stays and is run again.
    """

    def __init__(self, model: nn.Module, hidden: list[Any] | None) -> None:
        self._model = model
        self._hidden = hidden

    @property
    def is_split(self) -> bool:
        """Whether only hidden states and the head are held."""
        return self._hidden is not None

    def logits(self, batch: int, tokens: mx.array) -> mx.array:
        """fp32 logits (sequences, tokens, vocabulary) of batch ``batch``, whose input was ``tokens``."""
        if self._hidden is None:
            return run_rows(lambda rows: _logits(self._model, rows), tokens)
        import mlx.core as mx

        return _head_logits(self._model, mx.array(self._hidden[batch]), tokens)


def _logits(model: nn.Module, tokens: mx.array) -> mx.array:
    import mlx.core as mx

    logits: mx.array = model(tokens)
    return logits.astype(mx.float32)


def _head_logits(model: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    import mlx.core as mx

    found = find_stored(model)

    def call(index: mx.array) -> mx.array:
        found._answers[:] = [hidden[index]]
        return _logits(model, tokens[index])

    return run_rows(call, mx.arange(tokens.shape[0]))


def find_stored(model: nn.Module) -> Any:
    """The stand-in for the decoder inside a split model."""
    return next(module for _, module in model.named_modules() if type(module) is _stored_body())


def build_reference(model: nn.Module, batches: Sequence[mx.array]) -> Generator[int, None, Reference]:
    """Run the reference over ``batches`` of tokens (sequences, length) and keep what later comparisons need.

    Yields the tokens of each finished batch and returns the Reference.
    The model is split only if head and stored hidden states give its own logits back, tried on the first
    batch.
    """
    import mlx.core as mx
    import numpy as np

    found = find_body(model)
    if found is None:
        return Reference(model, None)
    parent, name = found
    body = parent[name]
    stand_in = _stored_body()(body)

    def run(rows: mx.array) -> mx.array:
        hidden: mx.array = body(rows)
        return hidden.astype(mx.float32)

    def splits(tokens: mx.array) -> bool:
        whole = _logits(model, tokens)
        try:
            stand_in._answers[:] = [run(tokens)]
            parent[name] = stand_in
            same = bool(mx.array_equal(whole, _logits(model, tokens)).item())
        except Exception:  # a body with its own calling convention: not an error, only not splittable
            same = False
        parent[name] = body
        return same

    if not splits(batches[0][:1, :16]):
        return Reference(model, None)
    hidden = []
    for tokens in batches:
        hidden.append(np.asarray(run_rows(run, tokens)))
        yield tokens.size
    parent[name] = stand_in
    return Reference(model, hidden)
