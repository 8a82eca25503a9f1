"""Which files of a model's folder are read at all, and which of them travel with the weights.

Both are decided by what a file is called and where it really lies: what travels is on a list, and a link is followed
only where it stays with the model. A folder from a stranger may call a link to a secret ``LICENSE``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlxq.errors import BadInputError

# Where transformers looks for chat templates beside the default one; the only folder that travels with a model.
TEMPLATES = "additional_chat_templates"
# What travels with the weights, byte for byte, by names in small letters.
TRAVELS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": (
        "tokenizer*.json",
        "tokenizer.txt",
        "*.model",
        "tokenizer.model.*",
        "*.tiktoken",
        "vocab*.json",
        "vocab*.txt",
        "merges.txt",
        "*.bpe",
        "added_tokens.json",
        "special_tokens_map.json",
        "tekken.json",
    ),
    "templates": ("chat_template*.json", "*.jinja", f"{TEMPLATES}/*.jinja"),
    "processors": ("*processor*.json", "*feature_extractor*.json"),
    "generation": ("generation_config.json",),
    "licence": (
        "licen[cs]e*",
        "*_licen[cs]e*",
        "*-licen[cs]e*",
        "copying*",
        "copyright*",
        "notice*",
        "*notices*",
        "*use_policy*",
        "terms*",
    ),
}
# What is read to know the model, and written anew.
OPENED = ("config.json", "model.safetensors.index.json", "hf_quant_config.json")
READ = (*OPENED, "README.md")
# Of mlxq itself, from an earlier run: they say nothing of the next.
_OURS = ("mlxq.json", "mlxq-comparison.png")
_CODE = ".py"
_SEALED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".npz", ".h5")
OTHER = "no part of an MLX model"
CODE = "code, and the model is not trusted"
LINK = "a link out of the model's folder"


def travels(name: str, *, trusted: bool) -> bool:
    """Does a file, by its path inside the model's folder, go with the weights? Code does where it is ``trusted``."""
    low = name.lower()
    if "/" in name and not (low.startswith(f"{TEMPLATES}/") and low.count("/") == 1):
        return False
    if low.endswith(_CODE):
        return trusted
    patterns = [pattern for group in TRAVELS.values() for pattern in group if ("/" in name) == ("/" in pattern)]
    return not low.endswith(_SEALED) and any(fnmatch.fnmatchcase(low, pattern) for pattern in patterns)


def left_behind(names: Iterable[str], weights: Iterable[str], *, trusted: bool) -> dict[str, str]:
    """The files (``names``) that are neither read nor travel, and why; of a subfolder only its own name."""
    known = {*weights, *READ, *_OURS}
    found = {}
    for name in sorted(names):
        if name in known or name.startswith(".") or travels(name, trusted=trusted):
            continue
        top, slash, _ = name.partition("/")
        found[top + slash] = CODE if name.lower().endswith(_CODE) and not slash else OTHER
    return found


def stays(file: Path, folder: Path) -> bool:
    """Whether ``file`` of a model's ``folder``, all links followed, is still the model's own.

    It is where it lies in the folder, or, in a snapshot of the Hub's cache, among the blobs of the same repository.
    """
    home, real = folder.resolve(), file.resolve()
    if real.is_relative_to(home):
        return True
    if home.parent.name != "snapshots" or not home.parents[1].name.startswith("models--"):
        return False
    return real.is_relative_to((home.parents[1] / "blobs").resolve())


def check_stays(files: Iterable[Path], folder: Path) -> None:
    """Raise BadInputError at the first of ``files`` that is a link out of ``folder``."""
    for file in files:
        if not stays(file, folder):
            raise BadInputError(
                f"{file} is a link out of the model's folder, which is not followed",
                "Name the folder where the files really lie, or put the file itself in place of the link.",
            )


def described(left: Mapping[str, str]) -> tuple[str, ...]:
    """What is left behind in a line for each reason, the names folded."""
    lines = []
    for why in (LINK, CODE, OTHER):
        names = [name for name, reason in left.items() if reason == why]
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"left behind, {why}: {', '.join(names[:4])}{more}")
    return tuple(lines)
