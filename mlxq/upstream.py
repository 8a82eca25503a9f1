"""What mlxq uses of ``mlx_lm``, all of it here, each with what is expected of it.

``mlx_lm`` promises little of this, so each use looks for what it needs before it is used: an update that took a
function or an argument away ends in one line that names both versions, and not in whatever Python says of it. It
stands on the ground because whatever runs a model stands on it.

Of model files, besides: a module ``mlx_lm.models.X`` has ``Model`` and ``ModelArgs``; a ``Model`` may have
``sanitize(weights)``, which renames, drops and assembles tensors lazily, ``quant_predicate(path, module)`` (True,
False, or a dict of ``bits``, ``group_size`` and ``mode``), ``cast_predicate(path)`` and ``layers``; its call takes
token ids (batch, tokens) and ``cache``; an embedding that also is the head is called through ``as_linear``. All of
these may be missing; none may mean something else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq.errors import MlxqError

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

TESTED = "0.32.2"

ModelClasses = Callable[[dict[str, Any]], tuple[type, type]]


class UpstreamError(MlxqError):
    """The installed ``mlx_lm`` lacks something that mlxq uses."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"mlx-lm {_installed()} is not as mlxq expects it (tested with {TESTED}): {missing}",
            f"Try: pip install -U mlxq, or pip install mlx-lm=={TESTED}",
        )


def _installed() -> str:
    try:
        return metadata.version("mlx-lm")
    except metadata.PackageNotFoundError:
        return "of unknown version"


@functools.cache
def _named(module: str, name: str, *parameters: str) -> Any:
    """``module.name``, which takes ``parameters`` by these names. Raises UpstreamError where it does not."""
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not exc.name.startswith("mlx_lm"):
            raise
        raise UpstreamError(f"there is no {exc.name}") from exc
    except AttributeError as exc:
        raise UpstreamError(f"there is no {module}.{name}") from exc
    if parameters:
        taken = inspect.signature(found).parameters
        missing = [parameter for parameter in parameters if parameter not in taken]
        if missing:
            raise UpstreamError(f"{module}.{name} takes no {missing[0]!r}")
    return found


def load_model(
    folder: Path, *, classes: ModelClasses, overrides: dict[str, Any] | None, trusted: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """Open a folder, every parameter unevaluated, and its config, of which ``overrides`` replace keys.

    Expected of ``mlx_lm.utils.load_model``: reads ``config.json`` and the headers of ``model*.safetensors`` of a
    folder; builds the model by ``get_model_classes(config)``; gives ``sanitize`` the checkpoint's tensors by their
    own names; reads AWQ, GPTQ, compressed-tensors, MXFP4 and ModelOpt checkpoints; quantizes modules that have
    scales; raises where a parameter is missing or left over (``strict``), and, whatever a model file raises, that.
    Runs a model file of the folder only with ``trust_remote_code``, which is ``trusted``.
    """
    load = _named(
        "mlx_lm.utils", "load_model", "lazy", "strict", "model_config", "get_model_classes", "trust_remote_code"
    )
    with _no_bytecode():
        opened: tuple[nn.Module, dict[str, Any]] = load(
            folder,
            lazy=True,
            strict=True,
            model_config=overrides,
            get_model_classes=classes,
            trust_remote_code=trusted,
        )
    return opened


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """A model file that is imported leaves no ``__pycache__`` in its folder, which may be somebody else's."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def default_classes() -> ModelClasses:
    """The ``get_model_classes`` of ``load_model``: config -> (``Model``, ``ModelArgs``).

    Expected: raises ValueError with "Model type X not supported" where there is no such architecture.
    """
    load = _named("mlx_lm.utils", "load_model", "get_model_classes")
    default = inspect.signature(load).parameters["get_model_classes"].default
    if default is inspect.Parameter.empty:
        raise UpstreamError("mlx_lm.utils.load_model has no default for 'get_model_classes'")
    classes: ModelClasses = default
    return classes


def load_tokenizer(folder: Path, *, trusted: bool, eos_token_ids: Any = None) -> Any:
    """The tokenizer of a folder; code that it brings runs only where it is ``trusted``.

    Expected of ``mlx_lm.utils.load_tokenizer``: hands its second argument on to ``AutoTokenizer.from_pretrained``,
    which asks on stdin where trust is not said; ``encode``, ``decode``, ``chat_template`` (None where there is none),
    ``apply_chat_template`` and the attributes of the ``transformers`` tokenizer it wraps.
    """
    load = _named("mlx_lm.utils", "load_tokenizer", "tokenizer_config_extra", "eos_token_ids")
    return load(folder, {"trust_remote_code": trusted}, eos_token_ids=eos_token_ids)


def preload() -> None:
    """Import what opens and runs models, so that it does not count where they are timed."""
    _named("mlx_lm", "stream_generate")


def stream_generate(model: nn.Module, tokenizer: Any, tokens: list[int], max_tokens: int) -> Iterator[Any]:
    """Answer greedily, a response at a time.

    Expected of ``mlx_lm.stream_generate``: responses with ``text`` (what is new), ``prompt_tps`` and
    ``generation_tps``; greedy where no sampler is given.
    """
    stream = _named("mlx_lm", "stream_generate", "prompt", "max_tokens")
    responses: Iterator[Any] = stream(model, tokenizer, prompt=tokens, max_tokens=max_tokens)
    return responses


def generate_step(model: nn.Module, tokens: mx.array, max_tokens: int) -> Iterator[Any]:
    """Generate exactly ``max_tokens`` tokens after the prompt ``tokens``, an end token or not.

    Expected of ``mlx_lm.generate.generate_step``: yields once a token, the first after the whole prompt.
    """
    step = _named("mlx_lm.generate", "generate_step", "prompt", "model", "max_tokens")
    steps: Iterator[Any] = step(prompt=tokens, model=model, max_tokens=max_tokens)
    return steps


def prompt_cache(model: nn.Module) -> list[Any]:
    """An empty cache for one batch.

    Expected of ``mlx_lm.models.cache.make_prompt_cache``: a list with an entry a layer, each with ``state``.
    """
    entries: list[Any] = _named("mlx_lm.models.cache", "make_prompt_cache")(model)
    return entries


def switch_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    """``SwitchLinear`` and its quantized form: a stack of experts.

    Expected: weight (experts, rows, columns); ``module(x, indices, sorted_indices=False)`` multiplies each x by the
    matrices that its indices name.
    """
    module = "mlx_lm.models.switch_layers"
    return _named(module, "SwitchLinear"), _named(module, "QuantizedSwitchLinear")


def multi_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    """``MultiLinear`` and its quantized form: a matrix for each head of latent attention.

    Expected: weight (heads, rows, columns); ``module(x, transpose=True)`` multiplies head by head.
    """
    return _named("mlx_lm.models.mla", "MultiLinear"), _named("mlx_lm.models.mla", "QuantizedMultiLinear")
