"""What loaders rely on in a model folder, held against its files: config, index, shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlxq.errors import MlxqError
from mlxq.headers import StoredTensor, read_file_header, read_json
from mlxq.methods.formats import AFFINE, MODES, fault_of

INDEX = "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"


def config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the quantization that a ``config.json`` states, a line each.

    mlx-lm reads ``quantization``, mlx-swift and LM Studio either; both are one object of ``bits``, ``group_size`` and
    ``mode``, and a module's path with its own three, or false where it is not quantized.
    """
    stated = config.get("quantization")
    if stated is None:
        return
    if not isinstance(stated, Mapping):
        yield "config.json: quantization is no object"
        return
    if config.get("quantization_config") != stated:
        yield "config.json: quantization_config is not the same as quantization"
    yield from _format_faults("quantization", stated, AFFINE.name)
    top = str(stated.get("mode", AFFINE.name))
    for path, entry in stated.items():
        if path in ("bits", "group_size", "mode") or entry is False:
            continue
        if not isinstance(entry, Mapping):
            yield f"config.json: quantization of {path} is {entry!r}, neither a format in full nor false"
            continue
        # Loaders differ in what a missing mode means where the model's own is not affine.
        yield from _format_faults(path, entry, AFFINE.name if top == AFFINE.name else None)
        allowed = {"bits", "group_size", "mode", *(mode.tensor_scale for mode in MODES.values())}
        yield from (
            f"config.json: {path} has {key!r}, which loaders do not know" for key in entry if key not in allowed
        )


def _format_faults(path: str, entry: Mapping[str, Any], mode: str | None) -> Iterator[str]:
    """Faults of one format; ``mode`` is what a missing one means, None where it may not be missing."""
    found = entry.get("mode", mode)
    if found is None:
        yield f"config.json: {path} has no mode"
        return
    bits, group_size = entry.get("bits"), entry.get("group_size")
    if not isinstance(bits, int) or not isinstance(group_size, int):
        yield f"config.json: {path} has bits {bits!r} and group_size {group_size!r}, which must be numbers"
    elif fault := fault_of(str(found), bits, group_size):
        yield f"config.json: {path}: {fault}"


def tensors_of(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor that mlx-lm would load from ``folder``, by name.

    Raises MlxqError where a header is broken, there are no weights, or a tensor is in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in sorted(folder.glob(WEIGHTS)):
        for tensor in read_file_header(file):
            if tensor.spec.name in found:
                raise MlxqError(f"{tensor.spec.name} is in {found[tensor.spec.name].file.name} and in {file.name}")
            found[tensor.spec.name] = tensor
    if not found:
        raise MlxqError(f"there are no {WEIGHTS}")
    return found


def index_faults(folder: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """What the index says that the files do not hold, a line each; nothing where one file needs no index."""
    files = {tensor.file.name for tensor in tensors.values()}
    if not (folder / INDEX).is_file():
        if len(files) > 1:
            yield f"{INDEX} is missing, and the weights are in {len(files)} files"
        return
    index = read_json(folder / INDEX)
    stated, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(stated, Mapping):
        yield f"{INDEX} has no weight_map"
        return
    held = {name: tensor.file.name for name, tensor in tensors.items()}
    wrong = sorted(name for name in held.keys() | stated.keys() if held.get(name) != stated.get(name))
    if wrong:
        more = f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        where = f"is in {held[wrong[0]]}" if wrong[0] in held else "is in no file"
        said = f"says {stated[wrong[0]]!r}" if wrong[0] in stated else "does not name it"
        yield f"{wrong[0]} {where}, and {INDEX} {said}{more}"
    yield from (
        f"{file} is not in {INDEX}, and mlx-lm loads it all the same" for file in sorted(files - set(stated.values()))
    )
    nbytes = sum(tensor.spec.nbytes for tensor in tensors.values())
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if total is not None and total != nbytes:
        yield f"{INDEX} has total_size {total!r}, and the tensors have {nbytes:,} bytes"
