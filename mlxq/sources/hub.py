"""A model on the Hugging Face Hub, fetched through ``huggingface_hub`` into its cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlxq.errors import BadInputError, MlxqError
from mlxq.sources.safetensors import SafetensorsFolder, open_folder

# What mlx_lm fetches, and the licence.
PATTERNS = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
    "LICENSE*",
]


def open_hub(model: str) -> SafetensorsFolder:
    """Download ``org/name[@revision]`` (or take it from the cache) and open it.

    Raises BadInputError where the Hub does not know it, MlxqError where it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, _, revision = model.partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=PATTERNS))
    except GatedRepoError as exc:
        raise BadInputError(
            f"{repo} is gated: its owner asks you to accept terms first",
            f"Open the page of {repo} on the Hub, accept its terms, then run: hf auth login",
        ) from exc
    except RevisionNotFoundError as exc:
        raise BadInputError(f"{repo} has no revision {revision!r}", "Name a branch, a tag or a commit of it.") from exc
    except RepositoryNotFoundError as exc:
        raise BadInputError(
            f"no model at {model!r}: it is no folder here, and no repository on the Hub that you can see",
            "Check the spelling; for a private repository run: hf auth login",
        ) from exc
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        first_line = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise MlxqError(
            f"no folder {model!r} here, and the Hub could not be reached for it: {first_line}",
            "Check the path, or your connection; the same command continues a broken download.",
        ) from exc
    source = open_folder(folder, model, base_model=repo)
    return replace(source, revision=folder.name if folder.parent.name == "snapshots" else revision or None)
