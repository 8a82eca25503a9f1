"""What a model's tokenizer files say, and how they encode a text; needs neither MLX nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxq.architecture.config import first_int
from mlxq.errors import BadInputError
from mlxq.headers import json_object, read_json
from mlxq.reading import MAX_SMALL_BYTES, MAX_TOKENIZER_BYTES, read_bytes

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource


@dataclass(frozen=True)
class TokenizerFacts:
    """What the small files say of the tokenizer; None where they do not say.

    ``counted`` says that the vocabulary was counted in the tokenizer itself; else it is the config's, which may have
    rows to spare.
    """

    kind: str | None
    vocabulary: int | None
    counted: bool
    chat_template: bool


@dataclass(frozen=True)
class Encoding:
    """A text as token ids and pieces, and whether its own tokens decode to it again."""

    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    decoded: str
    round_trips: bool


def tokenizer_facts(sidecars: Mapping[str, Path | bytes], config: Mapping[str, Any]) -> TokenizerFacts:
    """Facts from ``tokenizer.json``, ``tokenizer_config.json`` and the chat template's own file.

    The vocabulary is the config's where there is no ``tokenizer.json``, as for a model that is still on the Hub.
    """
    tokenizer = _json_sidecar(sidecars, "tokenizer.json")
    settings = _json_sidecar(sidecars, "tokenizer_config.json")
    model = _part(tokenizer, "model", dict)
    vocabulary = model.get("vocab")
    listed = range(len(vocabulary)) if isinstance(vocabulary, list) else _part(model, "vocab", dict).values()
    added = [token.get("id") for token in _part(tokenizer, "added_tokens", list) if isinstance(token, Mapping)]
    ids = {token for token in (*listed, *added) if isinstance(token, int)}
    template = "chat_template.jinja" in sidecars or "chat_template.json" in sidecars
    return TokenizerFacts(
        kind=_text(model.get("type")) or _text(settings.get("tokenizer_class")),
        vocabulary=len(ids) or first_int(config, "vocab_size"),
        counted=bool(ids),
        chat_template=template or bool(settings.get("chat_template")),
    )


_T = TypeVar("_T")


def _part(data: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    """What ``data`` has under ``key``, empty where that is something else than ``kind``."""
    found = data.get(key)
    return found if isinstance(found, kind) else kind()


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _json_sidecar(sidecars: Mapping[str, Path | bytes], name: str) -> dict[str, Any]:
    content = sidecars.get(name)
    if content is None:
        return {}
    if isinstance(content, bytes):
        return json_object(content, name)
    return read_json(content, MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_SMALL_BYTES)


def encode_text(source: ModelSource, text: str) -> Encoding:
    """Encode ``text`` as the model would see it, special tokens included.

    Uses ``tokenizers`` on ``tokenizer.json``, and ``transformers`` only where there is none. Raises
    BadInputError where the model has no tokenizer or it cannot be opened.
    """
    content = source.sidecars.get("tokenizer.json")
    if content is None:
        return _encode_slowly(source, text)
    from tokenizers import Tokenizer

    raw = content if isinstance(content, bytes) else read_bytes(content, MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(raw.decode("utf-8"))
    except Exception as exc:  # tokenizers raises bare Exception for whatever is wrong with the file.
        raise BadInputError(f"{source.name}: tokenizer.json does not open: {exc}") from exc
    encoded = tokenizer.encode(text)
    plain = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(plain.ids, skip_special_tokens=False)
    return Encoding(tuple(encoded.ids), tuple(encoded.tokens), decoded, decoded == text)


def _encode_slowly(source: ModelSource, text: str) -> Encoding:
    """As ``encode_text``, for tokenizers that only ``transformers`` can build."""
    if not {"tokenizer.model", "vocab.json", "tokenizer_config.json"} & source.sidecars.keys():
        raise BadInputError(f"{source.name} has no tokenizer", "Name a folder that holds its tokenizer files.")
    if source.weights_folder is None:
        raise BadInputError(f"{source.name} has no tokenizer.json", "Start from the model's safetensors folder.")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.weights_folder)
    except (OSError, ValueError, KeyError, ImportError) as exc:
        raise BadInputError(f"{source.name}: its tokenizer does not open: {str(exc).splitlines()[0]}") from exc
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    return Encoding(tuple(ids), tuple(tokenizer.convert_ids_to_tokens(ids)), decoded, decoded == text)
