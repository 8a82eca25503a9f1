"""What is fuzzed: every reader of a file or a text that a stranger can write, by name.

A target takes bytes. It may raise an ``MlxqError``, which is one clear line; anything else that it raises is a fault.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxq.architecture.inspection import inspect_model
from mlxq.clean import clean
from mlxq.errors import MlxqError
from mlxq.headers import json_object, parse_header
from mlxq.publish import card
from mlxq.recipe.gates import check_gates, parse_gate
from mlxq.recipe.load import recipe_from_dict
from mlxq.recipe.yaml import parse_document
from mlxq.sources import front_matter
from mlxq.sources.config_shape import check_config
from mlxq.sources.gguf_header import MAGIC, is_whole_header, read_gguf_header
from mlxq.sources.quantization import believed
from mlxq.sources.safetensors import SafetensorsFolder, open_folder
from mlxq.writing.report_shape import fault_of_report

_FOLDER = Path(tempfile.mkdtemp(prefix="mlxq-fuzz-"))
_CONTEXT = 4096
_HEADER = json.dumps(
    {
        f"model.layers.{layer}.{name}": {
            "dtype": "BF16",
            "shape": [8, 8],
            "data_offsets": [128 * (2 * layer + part), 128 * (2 * layer + part + 1)],
        }
        for layer in range(2)
        for part, name in enumerate(("self_attn.q_proj.weight", "mlp.experts.0.up_proj.weight"))
    }
).encode()


def header(data: bytes) -> None:
    """A safetensors header, its length first."""
    parse_header(data, len(data) + 512, "a file")


def index(data: bytes) -> None:
    """``model.safetensors.index.json`` beside one good file."""
    folder = _FOLDER / "index"
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(512))
    (folder / "model.safetensors.index.json").write_bytes(data)
    open_folder(folder, "a model")


def config(data: bytes) -> None:
    """``config.json``, as far as it is read without MLX: its shape, what is inspected, and what memory it takes."""
    found = json_object(data, "config.json")
    stored = {
        spec.name: _Stored(spec)
        for spec, _ in parse_header(
            struct.pack("<Q", len(_HEADER)) + _HEADER, 8 + len(_HEADER) + 512, "a file"
        ).values()
    }
    check_config(found, len(stored), "config.json")
    source = SafetensorsFolder("a model", _FOLDER, believed(found, stored), stored)  # type: ignore[arg-type]
    inspect_model(source, _CONTEXT)


class _Stored:
    def __init__(self, spec: Any) -> None:
        self.spec = spec


def gguf(data: bytes) -> None:
    """The header of a GGUF file; whatever the mutation did to the first bytes, they are the format's."""
    data = MAGIC + data[4:]
    is_whole_header(data)
    file = _FOLDER / "model.gguf"
    file.write_bytes(data)
    read_gguf_header(file)


def recipe(data: bytes) -> None:
    """A recipe file."""
    document = parse_document(data.decode("utf-8", errors="replace"))
    if not document.faults:
        recipe_from_dict(document.data, "fuzz")


def gate(data: bytes) -> None:
    """A quality gate."""
    parsed = parse_gate(data.decode("utf-8", errors="replace"))
    check_gates([parsed], {"a model": {"kl_mean": 0.1}})


def report(data: bytes) -> None:
    """``mlxq.json``: what passes as one is drawn as a card."""
    found = json_object(data, "mlxq.json")
    if fault_of_report(found) is not None:
        return
    text = card.render(card.make_card(found, "org/name", _FOLDER))
    if text != clean(text):
        raise AssertionError("a character that a reader would obey is in the card")


def model_card(data: bytes) -> None:
    """A model card: what is taken over from it, and what becomes of it when mlxq adds its section."""
    text = front_matter.as_text(data)
    ours = card.Card("name", {"library_name": "mlx"}, {"tags": ["mlx"]}, ("mlx",), f"{card.BEGIN}\n\n{card.END}")
    (_FOLDER / front_matter.FILE_NAME).write_bytes(data)
    card.own_words(card.render(ours, text))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "index": index,
    "config": config,
    "gguf": gguf,
    "recipe": recipe,
    "gate": gate,
    "report": report,
    "card": model_card,
}
EXPLAINED = MlxqError
