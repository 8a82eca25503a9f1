"""Arrays of files, and numbers of arrays."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np


def number(array: mx.array) -> float:
    """The one real number that ``array`` holds."""
    value = array.item()
    assert isinstance(value, int | float)
    return value


def load(file: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file."""
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return found


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder."""
    return {name: array for file in sorted(folder.glob("model*.safetensors")) for name, array in load(file).items()}


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """Same names, shapes, dtypes and bytes."""
    one, other = tensors(ours), tensors(theirs)
    assert sorted(one) == sorted(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.shape == other[name].shape, name
        assert bytes(np.asarray(array.view(mx.uint8))) == bytes(np.asarray(other[name].view(mx.uint8))), name
