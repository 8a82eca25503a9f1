"""What a new model card takes over from its source: from the source's own card, or what stands for one in its file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxq.errors import BadInputError
from mlxq.sources.front_matter import FILE_NAME, LONGEST, as_text, parse, split

_ONE_OR_MORE = ("license", "language", "base_model")
# Keys taken over from the card of the source, once: from then on they are the person's.
_OF_A_CARD = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
# Tags that name what the source was stored for, which the result is not.
_DROPPED_TAGS = {"gguf", "pytorch", "tf", "jax", "onnx", "transformers", "endpoints_compatible"}
_HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)/?")


@dataclass(frozen=True)
class SourceCard:
    """Front matter to take over, text and lists of text; ``fault`` says why there is none, where one was there."""

    values: Mapping[str, str | list[str]] = field(default_factory=dict)
    fault: str | None = None


def card_in(folder: Path) -> SourceCard:
    """What the card in a folder gives. Somebody else's card with a fault is no reason to stop."""
    file = folder / FILE_NAME
    if not file.is_file():
        return SourceCard()
    with file.open("rb") as stream:
        raw = stream.read(LONGEST + 1)
    try:
        values = parse(split(as_text(raw))[0]).values
    except BadInputError as exc:
        return SourceCard(fault=f"nothing is taken over from the card of the source: {exc.message}")
    return SourceCard(taken_over({key: values.get(key) for key in _OF_A_CARD}))


def card_of_gguf(metadata: Mapping[str, Any]) -> SourceCard:
    """What the ``general.*`` metadata of a GGUF file gives, which its converter took from the model's card.

    Its base models are those that the model in the file was made from: no model that this one is known to be.
    """
    return SourceCard(
        taken_over(
            {
                "license": metadata.get("general.license"),
                "license_name": metadata.get("general.license.name"),
                "license_link": metadata.get("general.license.link"),
                "language": metadata.get("general.languages"),
                "tags": metadata.get("general.tags"),
                "base_model": _base_models(metadata),
            }
        )
    )


def model_of_gguf(metadata: Mapping[str, Any]) -> str | None:
    """Hub id of the model in a GGUF file, from the addresses that its metadata gives, nearest first.

    Its one base model is that model itself where it has the same name, or names are not given.
    """
    for key in ("general.source.repo_url", "general.source.url", "general.repo_url"):
        if found := _hub_id(metadata.get(key)):
            return found
    bases = _base_models(metadata)
    names = (metadata.get("general.name"), metadata.get("general.base_model.0.name"))
    plain = {re.sub(r"[\W_]", "", name).lower() for name in names if isinstance(name, str)}
    return bases[0] if len(bases) == 1 and (len(plain) < 2 or None in names) else None


def taken_over(values: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Values of the shapes that the Hub takes; others are left."""
    found: dict[str, str | list[str]] = {}
    for key, value in values.items():
        many = [each for each in value if isinstance(each, str) and each] if isinstance(value, list) else []
        if key == "tags":
            many = [tag for tag in ([value] if isinstance(value, str) else many) if tag.lower() not in _DROPPED_TAGS]
            if many:
                found[key] = many
        elif isinstance(value, str) and value:
            found[key] = value
        elif many and key in _ONE_OR_MORE:
            found[key] = many
    return found


def _base_models(metadata: Mapping[str, Any]) -> list[str]:
    """Hub ids of the base models that a GGUF file names, in their order."""
    numbered = re.compile(r"general\.base_model\.(\d{1,6})\.(?:repo_)?url")
    urls = sorted((int(found[1]), key) for key in metadata if (found := numbered.fullmatch(key)))
    ids = (_hub_id(metadata[key]) for _, key in urls)
    return list(dict.fromkeys(each for each in ids if each))


def _hub_id(url: Any) -> str | None:
    found = _HUB_URL.fullmatch(url) if isinstance(url, str) else None
    return found[1] if found else None
