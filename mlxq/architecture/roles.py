"""What modules are for, where it matters to whoever chooses their formats: the head, and the routers of experts.

Asked of the model: of how it runs, and of how its modules lie to one another, never of its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlxq.architecture.config import text_config, ties_head
from mlxq.families import EMBEDDINGS, HEADS
from mlxq.recipe.match import layer_index

if TYPE_CHECKING:
    import mlx.nn as nn


class Shaped(Protocol):
    """A module by its path and the logical shape of its weight."""

    @property
    def path(self) -> str:
        """Dotted path in the module tree."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, outermost first."""

    @property
    def quantizable(self) -> bool:
        """Whether MLX has a quantized form of it."""


def tied_head(model: nn.Module, config: Mapping[str, Any]) -> str | None:
    """Path of the embedding that is also the head of ``model``, or None where it has a head of its own.

    A forward pass of one token is put together, and not evaluated: the last matrix that it multiplies by is the
    head. Where that does not tell, the config does (its own word, else what the model's arguments came to) and
    whether there is a head outside the layers. ``model`` may be changed by the pass, as some models write to their
    parameters while they run.
    """
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    leaves: dict[str, nn.Module] = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    matrices = {path: leaf for path, leaf in leaves.items() if "weight" in leaf and leaf["weight"].ndim == 2}
    embeddings = [path for path, leaf in matrices.items() if hasattr(leaf, "as_linear")]
    if not embeddings:
        return None
    last: str | None = _last_product(model, matrices)
    if last is not None and (last in embeddings or layer_index(last) is None):
        return last if last in embeddings else None
    args = getattr(model, "args", None)
    stated = {"tie_word_embeddings": getattr(args, "tie_word_embeddings", None), **text_config(config)}
    has_head = any(path.rpartition(".")[2] in HEADS for path in matrices if layer_index(path) is None)
    if not ties_head(stated, has_head=has_head):
        return None
    return next((path for path in embeddings if path.rpartition(".")[2] in EMBEDDINGS), embeddings[0])


def _last_product(model: nn.Module, matrices: Mapping[str, nn.Module]) -> str | None:
    """The last of ``matrices`` that a forward pass multiplies by; None where no pass can be put together.

    Rows that are looked up in an embedding are no product.
    """
    import mlx.core as mx

    paths = {id(leaf): path for path, leaf in matrices.items()}
    products: list[str] = []
    classes = {path: type(leaf) for path, leaf in matrices.items()}
    observed = {kind: _observed(kind, paths, products) for kind in set(classes.values())}
    for path, leaf in matrices.items():
        leaf.__class__ = observed[classes[path]]
    try:
        model(mx.array([[0]]))
    except Exception:  # A model file raises what it likes, as where it has kernels for Metal only.
        return None
    finally:
        for path, leaf in matrices.items():
            leaf.__class__ = classes[path]
    return products[-1] if products else None


def _observed(kind: type[nn.Module], paths: Mapping[int, str], products: list[str]) -> type[nn.Module]:
    """A subclass of ``kind`` whose instances note their path in ``products`` when they multiply."""

    def multiply(name: str) -> Any:
        def noted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            products.append(paths[id(self)])
            return getattr(kind, name)(self, *args, **kwargs)

        return noted

    name = "as_linear" if hasattr(kind, "as_linear") else "__call__"
    return type(kind.__name__, (kind,), {name: multiply(name)})


def routers(modules: Sequence[Shaped]) -> frozenset[str]:
    """Paths of the layers that choose among experts.

    Such a layer has one output for each expert of a stack. The stack lies beside it or below what is beside it;
    where the layer is the only matrix of a module of its own, the stack lies so to that module.
    """
    # A convolution's weight has three axes too, but is none of what can be quantized.
    stacks = {(above, m.shape[0]) for m in modules if len(m.shape) == 3 and m.quantizable for above in _above(m.path)}
    matrices = [m for m in modules if len(m.shape) == 2]
    inside: dict[str, int] = {}
    for module in matrices:
        inside[_parent(module.path)] = inside.get(_parent(module.path), 0) + 1
    found = set()
    for module in matrices:
        beside = _parent(module.path)
        places = [beside, _parent(beside)] if inside[beside] == 1 else [beside]
        if any((place, module.shape[0]) in stacks for place in places):
            found.add(module.path)
    return frozenset(found)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _above(path: str) -> tuple[str, str, str]:
    """The module that holds ``path``, and the two that hold that."""
    once = _parent(path)
    twice = _parent(once)
    return once, twice, _parent(twice)
