"""From what a person typed to a ``ModelSource``: a folder, a GGUF file, ``sample``, or a Hub id."""

from __future__ import annotations

import re
from pathlib import Path

from mlxq.errors import BadInputError
from mlxq.sources.base import ModelSource
from mlxq.sources.safetensors import open_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+\.gguf)?(@[\w./-]+)?")


def resolve(model: str, *, headers_only: bool = False, code: bool = False, tokenizer: bool = False) -> ModelSource:
    """Open ``model`` by its headers. Of a Hub id, ``headers_only`` fetches no more; ``code`` and
    ``tokenizer`` ask for its Python files and its tokenizer too.

    Raises BadInputError where it is neither a folder, a ``.gguf`` file, ``sample`` nor ``org/name[@revision]``.
    """
    if model == "sample":
        from mlxq.sources.gguf import open_gguf, sample_path

        return open_gguf(sample_path(), "sample")
    path = Path(model).expanduser()
    if path.is_dir():
        return open_folder(path, model)
    if path.is_file():
        if path.suffix == ".gguf":
            from mlxq.sources.gguf import open_gguf

            return open_gguf(path, model)
        raise BadInputError(
            f"{model} is a file that is not GGUF",
            "Name the folder that holds config.json and the weights, or a .gguf file.",
        )
    if _HUB_ID.fullmatch(model) and not model.startswith(("./", "../")):
        from mlxq.sources.hub import open_hub

        return open_hub(model, headers_only=headers_only, code=code, tokenizer=tokenizer)
    raise BadInputError(
        f"no model at {model!r}",
        "Name a folder, a .gguf file, a Hub id such as org/name, or 'sample' for the installed sample model.",
    )
