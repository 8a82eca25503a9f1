"""A model folder proved whole: what its files are, what loaders rely on, and the numbers they hold.

``verify_folder`` is all of it, on any folder. A run that has just written one, and ``upload``, ask for what can have
changed since: the bytes were hashed and every number looked at as it was written (``check_written``), and hashes that
are those recorded say that it still is so (``standing_faults``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.architecture.opening import open_lazily
from mlxq.architecture.token_ids import past_rows, rows_of, rows_of_model
from mlxq.errors import BadInputError, ChildError, MlxqError
from mlxq.files import refuse_pointers
from mlxq.headers import read_json
from mlxq.methods.formats import Format
from mlxq.metrics.size import measure_size
from mlxq.planning.plan import Plan
from mlxq.running.tokenizer import try_tokenizer
from mlxq.sources.base import ModelSource
from mlxq.sources.front_matter import FILE_NAME as CARD
from mlxq.sources.safetensors import open_folder
from mlxq.sources.soundness import Read, Unsound, read_through
from mlxq.writing.contract import WEIGHTS, config_faults, index_faults, tensors_of
from mlxq.writing.fidelity import TensorError, errors_against
from mlxq.writing.report import FILE_NAME, hash_files, read_report

# Written anew at each upload, so what their hashes were says nothing.
PLOT = "mlxq-comparison.png"
DRAWN = (CARD, PLOT)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and what was found; ``faults`` a line each, ``notes`` what no fault is."""

    name: str
    found: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def verify_folder(
    folder: Path, source: ModelSource | None = None, *, trusted: bool = False
) -> Iterator[Read | Check | TensorError]:
    """Check a model folder, and hold it against the ``source`` it was made from where that is given.

    Yields progress, each check when it is done, and each tensor's error. Code that the folder brings runs only where
    it is ``trusted``. Raises BadInputError where it is no model folder.
    """
    if not (folder / "config.json").is_file():
        raise BadInputError(f"{folder} is not a model folder: it has no config.json", "Name the folder of a model.")
    report = None
    try:
        report = read_report(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else None
        yield check_files(folder, report)
    except MlxqError as error:
        yield Check("files", FILE_NAME, (error.message,))
    contract = check_contract(folder)
    yield contract
    model, rows = check_model(folder, trusted=trusted)
    yield model
    yield check_tokenizer(folder, rows, trusted=trusted)
    try:
        written = open_folder(folder, str(folder))
    except MlxqError as error:
        known = error.message in contract.faults
        yield Check("numbers", "not read", () if known else (error.message,), ("the weights cannot be read",))
        return
    yield from check_numbers(written)
    if source is not None:
        yield from check_against(written, source, report)


def check_files(folder: Path, report: Mapping[str, Any] | None) -> Check:
    """Hashes and sizes against ``mlxq.json``, and no Git LFS pointers."""
    found = hash_files(folder)
    pointers = _pointers(folder)
    if report is None:
        return Check("files", f"{len(found)} files", pointers, (f"no {FILE_NAME}: nothing says what they should hold",))
    return Check(
        "files",
        f"{len(report['files'])} files, SHA-256 as {FILE_NAME} records",
        (*pointers, *recorded_faults(report, found)),
        tuple(f"{name} was not written by mlxq" for name in foreign_files(report, found)),
    )


def _pointers(folder: Path) -> tuple[str, ...]:
    faults = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        try:
            refuse_pointers({file.name: file})
        except BadInputError as error:
            faults.append(error.message)
    return tuple(faults)


def recorded_faults(report: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Files, hashed as ``found``, that are not what ``mlxq.json`` records, and weights that it does not know.

    The card is excused: a person may edit it.
    """
    recorded = report["files"]
    differing = [
        f"{name} is missing" if name not in found else f"{name} is not what was written: its SHA-256 differs"
        for name, facts in recorded.items()
        if name not in DRAWN and found.get(name, {}).get("sha256") != facts["sha256"]
    ]
    strange = [name for name in found if name not in recorded and fnmatch.fnmatch(name, WEIGHTS)]
    return (*differing, *(f"{name} holds weights that mlxq did not write" for name in strange))


def foreign_files(report: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that mlxq did not write, weights apart."""
    return tuple(n for n in found if n not in report["files"] and n not in DRAWN and not fnmatch.fnmatch(n, WEIGHTS))


def check_contract(folder: Path) -> Check:
    """Config, headers and index, as loaders rely on them."""
    faults: list[str] = []
    try:
        faults += config_faults(read_json(folder / "config.json"))
    except MlxqError as error:
        faults.append(error.message)
    try:
        tensors = tensors_of(folder)
        faults += index_faults(folder, tensors)
    except MlxqError as error:
        return Check("contract", "config; weights that cannot be read", (*faults, error.message))
    files = len({tensor.file for tensor in tensors.values()})
    if not faults:
        try:
            measure_size(folder)
        except MlxqError as error:
            faults.append(error.message)
    return Check("contract", f"config, index, {len(tensors):,} tensors in {files} of weights", tuple(faults))


def check_model(folder: Path, *, trusted: bool = False) -> tuple[Check, int | None]:
    """Whether ``mlx_lm`` opens it: every name and shape is one of the model's. Also the rows of its embedding."""
    from mlx.utils import tree_flatten

    try:
        model, config = open_lazily(folder, str(folder), trusted=trusted)
    except MlxqError as error:
        return Check("model", "does not open", (f"it does not load: {error.message}",)), None
    paths = {path for path, _ in tree_flatten(model.leaf_modules(), is_leaf=lambda node: hasattr(node, "parameters"))}
    entries = [key for key in config.get("quantization") or {} if key not in ("bits", "group_size", "mode")]
    strangers = tuple(
        f"config.json: quantization names {path}, which the model lacks" for path in entries if path not in paths
    )
    return Check("model", f"{config.get('model_type')}: mlx-lm takes every name and shape", strangers), rows_of_model(
        model
    )


def check_tokenizer(folder: Path, rows: int | None, *, trusted: bool = False) -> Check:
    """Whether the tokenizer opens, its ids have rows, and the chat template lays out a question."""
    try:
        tried = try_tokenizer(folder, rows, trusted=trusted)
    except ChildError as error:
        return Check("tokenizer", "does not open", (error.message,))
    faults = (tried.misfit, tried.template_fault)
    unknown = None if rows is not None else "its ids were not held against an embedding: the model did not open"
    notes = (tried.unreachable, unknown, None if tried.template else "no chat template")
    template = ", and a chat template" if tried.template else ""
    return Check("tokenizer", f"{tried.tokens:,} tokens{template}", *(tuple(filter(None, x)) for x in (faults, notes)))


def check_numbers(written: ModelSource) -> Iterator[Read | Check]:
    """Every float and every scale of a folder is a finite number."""
    faults, count, total = [], 0, 0
    for event in read_through(written, scale_codes(written)):
        if isinstance(event, Unsound):
            faults.append(str(event))
        else:
            count, total = count + (event.finished is not None), event.total_bytes
            yield event
    yield Check("numbers", f"{count:,} tensors of floats and scales read, {total:,} bytes", tuple(faults))


def scale_codes(model: ModelSource) -> dict[str, int]:
    """The tensors of a model in MLX's formats whose uint8 codes stand for scales, with the largest that is a number."""
    quantization = model.config.get("quantization") or {}
    found = {}
    for name, spec in model.tensors.items():
        module, _, part = name.rpartition(".")
        if part == "scales" and spec.dtype == "U8" and quantization:
            codes = Format.from_config(quantization.get(module) or quantization).kind.scale_codes
            found[name] = codes.largest if codes else 255
    return found


def check_against(
    written: ModelSource, source: ModelSource, report: Mapping[str, Any] | None
) -> Iterator[Read | Check | TensorError]:
    """Each tensor's error against what its format allows."""
    methods = {module["path"]: module["method"] for module in (report or {}).get("modules", ())}
    found: list[TensorError] = []
    try:
        for event in errors_against(written, source, methods):
            if isinstance(event, TensorError):
                found.append(event)
            yield event
    except BadInputError as error:
        yield Check("source", source.name, (error.message,))
        return
    exact = sum(error.error == 0 for error in found)
    faults = tuple(str(error) for error in found if not error.within)
    yield Check("source", f"{len(found):,} tensors against {source.name}, {exact:,} of them equal", faults)


def check_written(plan: Plan, folder: Path) -> None:
    """Check what a run has just written against its plan: sizes, headers, contract, and that ``mlx_lm`` takes it.

    Raises MlxqError at the first fault.
    """
    planned = {spec.name: spec for step in plan.steps for spec in step.outputs}
    for shard in plan.shards:
        size = (folder / shard.file).stat().st_size
        if size != shard.nbytes:
            raise MlxqError(f"{folder / shard.file} has {size:,} bytes where {shard.nbytes:,} were planned")
    found = {name: tensor.spec for name, tensor in tensors_of(folder).items()}
    if found != planned:
        wrong = sorted(set(found.items()) ^ set(planned.items()), key=lambda item: item[0])[0][0]
        raise MlxqError(f"{folder}: tensor {wrong} is not what was planned")
    if faults := standing_faults(folder, trusted=plan.source.trusted):
        raise MlxqError(f"the output is not whole: {faults[0]}", f"It is kept in {folder} for a look.")


def standing_faults(folder: Path, *, trusted: bool = False) -> tuple[str, ...]:
    """What is wrong with a folder whose bytes are known: contract, model, Git LFS pointers, token ids."""
    contract = check_contract(folder)
    if contract.faults:
        return contract.faults
    model, rows = check_model(folder, trusted=trusted)
    if model.faults:
        return model.faults
    tokenizer = {"tokenizer.json": folder / "tokenizer.json"} if (folder / "tokenizer.json").is_file() else {}
    past = past_rows(tokenizer, rows) if not (pointers := _pointers(folder)) else None
    return (*pointers, *([f"tokenizer.json: {past}"] if past and past.ordinary else ()))


def check_companions(plan: Plan) -> str | None:
    """Look at the files that would travel with a model before its weights are read; a remark, where there is one.

    Raises BadInputError where one is a Git LFS pointer, or text can come to token ids that the embedding lacks.
    """
    refuse_pointers(plan.source.sidecars)
    past = past_rows(plan.source.sidecars, rows_of(plan.architecture))
    if past is None:
        return None
    if past.ordinary:
        raise BadInputError(
            f"{plan.source.name}: its tokenizer does not fit its embedding: {past}",
            "MLX would read other memory for it: fetch the tokenizer that belongs to these weights.",
        )
    return f"its tokenizer's {past}; it is a special token, so plain text never comes to it"
