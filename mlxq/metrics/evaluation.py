"""A model that computes in fp32 on the numbers its weights stand for.

MLX's CPU backend multiplies bf16 and quantized matrices at 2 to 7 GFLOP/s and fp32 ones at the speed of the
BLAS, so on a CPU every matrix is dequantized to fp32 first. On a GPU the packed weights stay as they are,
with scales, biases and activations in fp32: the quantized kernels then compute in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlxq import upstream
from mlxq.errors import MlxqError
from mlxq.machine.cores import on_cpu
from mlxq.methods.formats import Format

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


def evaluation_model(model: nn.Module, *, own_dtype: bool = False, resident: bool | None = None) -> nn.Module:
    """Make ``model`` compute in fp32 on the numbers its weights stand for. Changes it in place.

    ``own_dtype`` keeps activations in the dtype the model was stored in, and only accumulates products in
    fp32: what an unquantized model's own kernels do, at the speed of fp32 (used for the noise floor).
    ``resident`` says whether the fp32 matrices stay in memory or are made again at each call; by default they
    stay where they take less than half of the free memory. Raises MlxqError for a quantized module of a kind
    unknown here.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map_with_path

    if not on_cpu():
        if not own_dtype:
            model.set_dtype(mx.float32)
        return model
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    if resident is None:
        from mlxq.machine.runtime import free_memory_bytes

        resident = sum(_fp32_bytes(leaf) for _, leaf in leaves) < free_memory_bytes() // 2
    dtype = None if own_dtype else mx.float32
    replace = functools.partial(_with_fp32_products, resident=resident, dtype=dtype)
    model.update_modules(tree_map_with_path(replace, model.leaf_modules(), is_leaf=nn.Module.is_module))
    if not own_dtype:
        model.set_dtype(mx.float32)
    return model


def _fp32_bytes(leaf: nn.Module) -> int:
    if "weight" not in leaf:
        return 0
    fmt = Format.of_module(leaf)
    packed = leaf["weight"]
    return int(packed.size // packed.shape[-1] * fmt.logical_columns(packed.shape[-1]) if fmt else packed.size) * 4


def _with_fp32_products(path: str, leaf: nn.Module, *, resident: bool, dtype: mx.Dtype | None) -> nn.Module:
    """The fp32 counterpart of a module that multiplies by a matrix; any other module as it is.

    ``dtype`` is what an embedding gives, None for the one it is stored in.
    """
    kinds = _replacements()
    for kind, replacement in kinds.items():
        if type(leaf) is kind:
            return replacement(leaf, resident, dtype)
    if Format.of_module(leaf):
        raise MlxqError(f"{path}: cannot dequantize a {type(leaf).__name__} for evaluation")
    return leaf


@functools.cache
def _matrix() -> Any:
    """The class of a weight that multiplies in fp32."""
    import mlx.core as mx
    import mlx.nn as nn

    class Matrix(nn.Module):  # type: ignore[misc]
        """A weight (..., rows, columns) that multiplies in fp32, whatever it is stored as.

        Products come back in the dtype of the activations that went in.
        """

        def __init__(self, stored: nn.Module, resident: bool, dtype: mx.Dtype | None) -> None:
            super().__init__()
            self._format = Format.of_module(stored)
            self._stored = self._format.stored_parts(stored) if self._format else {"weight": stored["weight"]}
            computed = self._stored.get("scales", self._stored["weight"]).dtype
            own = computed if mx.issubdtype(computed, mx.floating) else mx.bfloat16
            self._dtype = dtype or own
            if stored.get("bias") is not None:
                self.bias = stored["bias"]
            if resident:
                fp32 = self.rows(slice(None))
                mx.eval(fp32)
                self._stored, self._format = {"weight": fp32}, None

        def rows(self, index: Any) -> mx.array:
            """Rows of the weight in fp32; scales and biases are widened first, so nothing is rounded on the
            way.
            """
            if self._format is None:
                plain: mx.array = self._stored["weight"][index]
                return plain.astype(mx.float32)
            return self._format.decode(self._format.rows(self._stored, index))

        @property
        def weight(self) -> mx.array:
            return self.rows(slice(None))

    return Matrix


@functools.cache
def _replacements() -> dict[type, Callable[[nn.Module, bool, mx.Dtype | None], nn.Module]]:
    """MLX's matrix modules, quantized and not -> what stands in for them."""
    import mlx.core as mx
    import mlx.nn as nn

    class Linear(_matrix()):  # type: ignore[misc]
        def __call__(self, x: mx.array) -> mx.array:
            y: mx.array = (x.astype(mx.float32) @ self.weight.T).astype(x.dtype)
            return y + self.bias if "bias" in self else y

    class Embedding(_matrix()):  # type: ignore[misc]
        def __call__(self, ids: mx.array) -> mx.array:
            found: mx.array = self.rows(ids).astype(self._dtype)
            return found

        def as_linear(self, x: mx.array) -> mx.array:
            y: mx.array = (x.astype(mx.float32) @ self.weight.T).astype(x.dtype)
            return y

    class SwitchLinear(_matrix()):  # type: ignore[misc]
        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            y = mx.gather_mm(
                x.astype(mx.float32),
                self.weight.swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=sorted_indices,
            ).astype(x.dtype)
            return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y

    class MultiLinear(_matrix()):  # type: ignore[misc]
        def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
            weight = self.weight.swapaxes(-1, -2) if transpose else self.weight
            y: mx.array = (x.astype(mx.float32) @ weight).astype(x.dtype)
            return y

    return {
        nn.Linear: Linear,
        nn.QuantizedLinear: Linear,
        nn.Embedding: Embedding,
        nn.QuantizedEmbedding: Embedding,
        **dict.fromkeys(upstream.switch_linears(), SwitchLinear),
        **dict.fromkeys(upstream.multi_linears(), MultiLinear),
    }
