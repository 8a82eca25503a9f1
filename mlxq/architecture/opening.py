"""Open a model with ``mlx_lm`` for its headers and nothing else: no weight is read, and nothing is allocated."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq import upstream
from mlxq.errors import BadInputError, MlxqError
from mlxq.headers import encode_header, read_file_header, read_json
from mlxq.reading import read_bytes
from mlxq.sources.base import ModelSource
from mlxq.sources.config_shape import check_config
from mlxq.sources.quantization import believed

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn


@contextmanager
def opened_source(
    source: ModelSource, checkpoint: dict[str, mx.array] | None = None
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """``open_lazily`` on a source, which says itself whether its own code may run.

    What the model's arrays are read from stays in place inside the context.
    """
    with openable_folder(source) as folder:
        yield open_lazily(folder, source.name, checkpoint, trusted=source.trusted)


def open_lazily(
    folder: Path, name: str, checkpoint: dict[str, mx.array] | None = None, *, trusted: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """Open a folder with ``mlx_lm``, every parameter unevaluated, and its config.

    ``checkpoint``, where given, is filled with the arrays as the files name them, before ``sanitize``. A model file
    of the folder's own runs only where it is ``trusted``.
    """
    find_classes = upstream.default_classes()

    def observed_classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, args_class = find_classes(config)

        class Observed(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                if checkpoint is not None:
                    checkpoint.update(weights)
                parent = getattr(super(), "sanitize", None)
                return parent(weights) if parent else weights

        Observed.__name__ = model_class.__name__
        return Observed, args_class

    try:
        model, config = upstream.load_model(
            folder,
            classes=observed_classes,
            overrides=_disbelieved(folder),
            trusted=trusted,
        )
    except MlxqError:
        raise
    except Exception as exc:  # mlx_lm raises whatever its model files raise; all of it means: cannot open.
        raise _explained(exc, folder, name) from exc
    return model, config


def _disbelieved(folder: Path) -> dict[str, Any]:
    """What a folder's config says of a quantization that its tensors do not have, each key as None."""
    config = read_json(folder / "config.json")
    names = [tensor.spec.name for file in folder.glob("model*.safetensors") for tensor in read_file_header(file)]
    check_config(config, len(names), str(folder / "config.json"))
    return dict.fromkeys(config.keys() - believed(config, names).keys())


def _explained(exc: Exception, folder: Path, name: str) -> BadInputError:
    """Turn what ``mlx_lm`` raised into one line and a way forward."""
    # Some messages list the parameters they mean on the lines that follow.
    said = " ".join(str(exc).split()) or type(exc).__name__
    said = said if len(said) <= 300 else said[:300] + " ..."
    config = read_json(folder / "config.json")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method is None and (folder / "hf_quant_config.json").is_file():
        method = "modelopt"
    if "model_type" not in config:
        return BadInputError(f"{name}: config.json has no model_type", "It is no language model mlx-lm knows.")
    if "not supported" in said and "Model type" in said:
        return BadInputError(
            f"{name}: this mlx-lm has no architecture {config['model_type']!r}", "Try: pip install -U mlx-lm"
        )
    if "trust_remote_code" in said:
        return BadInputError(
            f"{name} wants to run its own code ({config.get('model_file')})",
            "Read that file; if you trust it, add --trust-remote-code.",
        )
    if method is not None:
        return BadInputError(
            f"{name} is quantized as {method!r} in a way mlx-lm cannot read: {said}",
            "Start from the unquantized original, or dequantize it to bfloat16 with the tool that made it.",
        )
    return BadInputError(
        f"{name} does not fit mlx-lm's {config['model_type']!r} model: {type(exc).__name__}: {said}",
        "The checkpoint may be incomplete, or of a newer kind: try pip install -U mlx-lm",
    )


@contextmanager
def openable_folder(source: ModelSource) -> Iterator[Path]:
    """A folder ``mlx_lm`` can open for its headers: the source's own, or sparse files with the same header."""
    if source.weights_folder is not None:
        yield source.weights_folder
        return
    with tempfile.TemporaryDirectory(prefix="mlxq-headers-") as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text(json.dumps(dict(source.config)), encoding="utf-8")
        generation = source.sidecars.get("generation_config.json")
        if generation is not None:
            data = generation if isinstance(generation, bytes) else read_bytes(generation)
            (folder / "generation_config.json").write_bytes(data)
        header = encode_header(source.tensors.values(), {})
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header)
            os.truncate(file.fileno(), len(header) + sum(spec.nbytes for spec in source.tensors.values()))
        yield folder
