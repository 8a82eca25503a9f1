"""A model's tokenizer: what its files say, how it encodes a text, and the one way in which it is opened."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxq import upstream
from mlxq.architecture.config import first_int
from mlxq.errors import BadInputError
from mlxq.files import refuse_pointer, refuse_pointers
from mlxq.headers import json_object
from mlxq.reading import MAX_SMALL_BYTES, MAX_TOKENIZER_BYTES, read_bytes

if TYPE_CHECKING:
    from mlxq.sources.base import ModelSource

# Files that a tokenizer is made of; a folder without any has none.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.tiktoken", "spiece.model", "sentencepiece*")


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
    limit = MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_SMALL_BYTES
    raw = content if isinstance(content, bytes) else read_bytes(content, limit)
    refuse_pointer(name, raw)
    return json_object(raw, name)


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
    refuse_pointer("tokenizer.json", raw)
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
    tokenizer = source_tokenizer(source, f"{source.name}'s")
    ids = tokenizer.encode(text)
    decoded = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
    return Encoding(tuple(ids), tuple(tokenizer.convert_ids_to_tokens(ids)), decoded, decoded == text)


def source_tokenizer(source: ModelSource, whose: str) -> Any:
    """The tokenizer of a source, from the files that travel with it and no others; see ``open_tokenizer``."""
    with tempfile.TemporaryDirectory(prefix="mlxq-tokenizer-") as temporary:
        folder = Path(temporary)
        refuse_pointers(source.sidecars)
        for name, content in source.sidecars.items():
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        # Some tokenizers are told apart by the model's type.
        (folder / "config.json").write_text(json.dumps(dict(source.config)), encoding="utf-8")
        return open_tokenizer(folder, whose, trusted=source.trusted)


def open_tokenizer(folder: Path, whose: str, *, trusted: bool = False, eos_token_ids: Any = None) -> Any:
    """The tokenizer of a folder, with its own code only where ``trusted``; ``whose`` it is begins what is raised.

    The one place where a tokenizer is loaded by ``transformers``, which asks on stdin where trust is not said. Raises
    BadInputError where there is none or it does not load.
    """
    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        raise BadInputError(
            f"{whose} tokenizer is missing: there are no tokenizer files", "Add the original's tokenizer files."
        )
    refuse_pointers({file.name: file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)})
    try:
        return upstream.load_tokenizer(folder, trusted=trusted, eos_token_ids=eos_token_ids)
    except Exception as exc:  # Whatever a tokenizer's files make it raise means: does not load.
        if "trust_remote_code" in str(exc):
            raise BadInputError(
                f"{whose} tokenizer wants to run its own code, which was not trusted",
                "Read that code; if you trust it, add --trust-remote-code.",
            ) from exc
        said = " ".join(str(exc).replace(str(folder), "its folder").split())
        raise BadInputError(f"{whose} tokenizer does not load: {type(exc).__name__}: {said[:300]}") from exc
