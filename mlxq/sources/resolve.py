"""From what a person typed to a ``ModelSource``: a folder, a GGUF file, ``sample``, or a Hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mlxq.errors import BadInputError
from mlxq.reading import unreadable
from mlxq.retry import Waiting, told
from mlxq.sources.base import ModelSource
from mlxq.sources.gguf import open_gguf
from mlxq.sources.gguf_parts import models_in
from mlxq.sources.safetensors import open_folder

if TYPE_CHECKING:
    from mlxq.sources.download import Downloading
    from mlxq.sources.sample import Fetching

    Event: TypeAlias = Waiting | Fetching | Downloading


def resolve(
    model: str,
    *,
    tokenizer: bool = False,
    trusted: bool = False,
    on_event: Callable[[Event], None] = lambda _: None,
) -> ModelSource:
    """Open ``model`` by its headers: nothing of the weights is fetched where it is on the Hub.

    ``tokenizer`` has the tokenizer fetched there, ``trusted`` lets Python files that come with it run. ``sample`` is
    fetched whole where the cache does not have it. ``on_event`` is told what is waited for and what is fetched. Raises
    BadInputError where it is neither a folder, a ``.gguf`` file, ``sample`` nor ``org/name[/file.gguf][@revision]``.
    """
    if model == "sample":
        from mlxq.sources import sample

        return told(sample.open_sample(sample.SAMPLE, sample.sample_folder()), on_event)
    path = _expanded(model)
    if path.is_dir():
        ggufs = models_in(file.name for file in path.glob("*.gguf"))
        if len(ggufs) == 1 and not any(path.glob("model*.safetensors")):
            # Some part of it is here; the first may be missing.
            return open_gguf(path / next(iter(ggufs)), model)
        return open_folder(path, model, trusted=trusted)
    if path.is_file():
        if path.suffix == ".gguf":
            return open_gguf(path, model)
        raise BadInputError(
            f"{model} is a file that is not GGUF",
            "Name the folder that holds config.json and the weights, or a .gguf file.",
        )
    from mlxq.sources.hub import open_hub
    from mlxq.sources.remote import parse_reference

    if (reference := parse_reference(model)) is not None:
        return open_hub(model, reference, tokenizer=tokenizer, trusted=trusted, on_wait=on_event)
    raise BadInputError(
        f"no model at {model!r}",
        "Name a folder, a .gguf file, a Hub id such as org/name, or 'sample' for a small model to try things on.",
    )


def _expanded(model: str) -> Path:
    """``model`` as a path, ``~`` and ``~user`` as the home they mean."""
    try:
        path = Path(model).expanduser()
        path.exists()
    except RuntimeError as exc:
        raise BadInputError(f"no model at {model!r}: there is no such home folder") from exc
    except (OSError, ValueError) as exc:
        raise unreadable(model, exc) from exc
    return path
