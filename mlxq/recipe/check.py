"""From a draft to a recipe: what the schema can't see, and every fault at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mlxq.methods.formats import AFFINE, MODES, Format, fault_of
from mlxq.methods.registry import AUTO, METHOD_NAMES, needs_text, uses_text
from mlxq.methods.rtn import RTN
from mlxq.recipe.draft import Draft, kind_of
from mlxq.recipe.gates import gate_fault
from mlxq.recipe.match import pattern_fault, slice_fault
from mlxq.recipe.model import DEFAULT_OPTIONS, Budget, Calibration, Recipe, Rule
from mlxq.recipe.schema import MOST_GATES, BudgetModel, FitsModel, UploadModel, schema_faults
from mlxq.recipe.target import Target, target_faults
from mlxq.recipe.yaml import KeyPath
from mlxq.tensors import DTYPE_BY_NAME, parse_size


def build(draft: Draft, name: str) -> Recipe:
    """The recipe that a draft comes to. Raises RecipeError with all faults of the draft.

    Values of the wrong type are the schema's to report; all else here passes over them.
    """
    for found in schema_faults(draft.data):
        if found.known:
            draft.add_unknown_key(found.path, found.known)
        else:
            draft.add_fault(found.path, found.message)
    data = draft.data
    if isinstance(data.get("dtype"), str) and data["dtype"] not in DTYPE_BY_NAME:
        message = f"unknown dtype {kind_of(data['dtype'])}; known are {', '.join(DTYPE_BY_NAME)}"
        draft.add_fault(("dtype",), message, data["dtype"], DTYPE_BY_NAME)
    default = _format(draft, ("default",), data["default"], None) if isinstance(data.get("default"), dict) else None
    rules = [_rule(draft, i, raw, default) for i, raw in enumerate(_items(data.get("rules"))) if isinstance(raw, dict)]
    budget = _budget(draft)
    method = _method(draft)
    options = _options(draft)
    calibration = _calibration(draft, method)
    gates = tuple(text for text in _items(data.get("gates")) if isinstance(text, str))
    for index, text in enumerate(gates[:MOST_GATES]):
        if fault := gate_fault(text):
            draft.add_fault(("gates", index), fault)
    upload = _upload(draft)
    if draft.faults:
        raise draft.refusal()
    return Recipe(
        name=name,
        path=None,
        model=data.get("model"),
        output=data.get("output"),
        dtype=data.get("dtype"),
        default=default,
        rules=tuple(rule for rule in rules if rule is not None),
        budget=budget,
        options=options,
        method=method,
        calibration=calibration,
        strict=data.get("strict", False),
        gates=gates,
        upload=upload,
        text="",
        description="",
    )


def _budget(draft: Draft) -> Budget | None:
    """The budget, or None with its faults added."""
    raw = draft.data.get("budget")
    if not isinstance(raw, dict):
        if "options" in draft.data:
            draft.add_fault(("options",), "is what a budget chooses from; add a budget")
        return None
    if "default" in draft.data:
        draft.add_fault(("default",), "the budget decides what default would; delete one (rules still come first)")
    given = [key for key in BudgetModel.model_fields if key in raw]
    if len(given) != 1:
        draft.add_fault(("budget",), f"needs one of size, bpw and fits, not {len(given)}")
        return None
    size_bytes = None
    if isinstance(raw.get("size"), str):
        size_bytes = parse_size(raw["size"])
        if size_bytes is None:
            message = f"cannot read the size {kind_of(raw['size'])}; write it as 2.2GB, 900MB or 2GiB"
            draft.add_fault(("budget", "size"), message)
        elif size_bytes == 0:
            draft.add_fault(("budget", "size"), "no weights fit in 0 bytes")
    fits = raw["fits"] if isinstance(raw.get("fits"), dict) else {}
    bpw = raw.get("bpw")
    return Budget(
        size_bytes=size_bytes,
        bpw=float(bpw) if isinstance(bpw, (int, float)) else None,
        device=fits.get("device"),
        context=fits.get("context", FitsModel.model_fields["context"].default),
    )


def _method(draft: Draft) -> str:
    method = draft.data.get("method")
    if isinstance(method, str) and method not in METHOD_NAMES:
        message = f"unknown method {kind_of(method)}; known are {', '.join(METHOD_NAMES)}"
        draft.add_fault(("method",), message, method, METHOD_NAMES)
    if isinstance(method, str):
        return method
    return AUTO if "budget" in draft.data else RTN.name


def _options(draft: Draft) -> tuple[Format, ...]:
    """What the budget chooses from, each format once."""
    found = [
        _format(draft, ("options", index), {"bits": raw} if _is_whole(raw) else raw, None)
        for index, raw in enumerate(_items(draft.data.get("options")))
        if _is_whole(raw) or isinstance(raw, dict)
    ]
    return tuple(dict.fromkeys(fmt for fmt in found if fmt)) or DEFAULT_OPTIONS


def _calibration(draft: Draft, method: str) -> Calibration:
    raw = draft.data.get("calibration")
    if not isinstance(raw, dict):
        return Calibration()
    if method in METHOD_NAMES and not uses_text(method) and "budget" not in draft.data:
        draft.add_fault(("calibration",), "nothing uses it: add a budget, or method: fit or gptq")
    texts = tuple(text for text in _items(raw.get("text", "builtin")) if isinstance(text, str))
    alone = [text for text in ("builtin", "self", "none") if text in texts]
    if len(texts) > 1 and alone:
        draft.add_fault(("calibration", "text"), f"{alone[0]} does not mix with other texts")
    if texts == ("none",) and method in METHOD_NAMES and needs_text(method):
        message = "gptq feeds errors back along the inputs, so it needs text; fit works without"
        draft.add_fault(("calibration", "text"), message)
    tokens = raw.get("tokens", Calibration.tokens)
    return Calibration(texts, tokens if _is_whole(tokens) else 0)


def _upload(draft: Draft) -> Target | None:
    """Where to publish, or None with its faults added."""
    raw = draft.data.get("upload")
    if not isinstance(raw, dict):
        return None
    known = {key: value for key, value in raw.items() if key in UploadModel.model_fields}
    try:
        target = Target(**UploadModel.model_validate(known).model_dump(exclude_unset=True))
    except ValidationError:
        return None
    found = list(target_faults(target))
    for key, message in found:
        draft.add_fault(("upload", key), message)
    return None if found else target


def _rule(draft: Draft, index: int, raw: dict[str, Any], default: Format | None) -> Rule | None:
    """One rule, or None with its faults added."""
    at: KeyPath = ("rules", index)
    before = len(draft.faults)
    patterns = [text for text in _items(raw.get("match")) if isinstance(text, str)]
    slices = [str(text) for text in _items(raw.get("layers")) if isinstance(text, str) or _is_whole(text)]
    for key, texts, fault_in in (("match", patterns, pattern_fault), ("layers", slices, slice_fault)):
        for position, text in enumerate(texts):
            fault = fault_in(text)
            if fault:
                draft.add_fault((*at, key, position), fault)
    formatted = [key for key in ("bits", "group_size", "mode") if key in raw]
    keep = raw.get("keep") is True
    if keep and formatted:
        message = f"keep: true leaves nothing to quantize; delete it or {' and '.join(formatted)}"
        draft.add_fault((*at, "keep"), message)
    if not keep and not formatted:
        draft.add_fault(at, "does nothing; give it bits, group_size or mode, or keep: true")
    fmt = _format(draft, at, raw, default)
    if len(draft.faults) > before:
        return None
    origin = draft.origin(at)
    return Rule(
        patterns=tuple(patterns),
        layers=tuple(slices) if "layers" in raw else None,
        format=None if keep else fmt,
        optional=raw.get("optional") is True,
        where=f"{origin.place} {origin.path}",
        inherited=index >= draft.own_rules,
    )


def _format(draft: Draft, at: KeyPath, raw: Mapping[str, Any], base: Format | None) -> Format | None:
    """The format at ``at``; what it leaves out is ``base``'s where the mode is the same, else the mode's."""
    mode = raw.get("mode", base.mode if base else AFFINE.name)
    if not isinstance(mode, str):
        return None
    if mode not in MODES:
        draft.add_fault((*at, "mode"), f"unknown mode {kind_of(mode)}; MLX has {', '.join(MODES)}", mode, MODES)
        return None
    same = base if base and base.mode == mode else MODES[mode].default
    bits, group_size = raw.get("bits", same.bits), raw.get("group_size", same.group_size)
    if not _is_whole(bits) or not _is_whole(group_size):
        return None
    # Asked one at a time, so that both wrong is two faults.
    bits_fault = fault_of(mode, bits, MODES[mode].group_sizes[0])
    group_fault = fault_of(mode, MODES[mode].bits[0], group_size)
    inherits = (
        ""
        if "mode" in raw or bits not in AFFINE.bits
        else f" (mode is the default's; say `mode: {AFFINE.name}` for {bits} bits)"
    )
    if bits_fault:
        draft.add_fault((*at, "bits"), bits_fault + inherits)
    if group_fault:
        draft.add_fault((*at, "group_size"), group_fault)
    return None if bits_fault or group_fault else Format(bits, group_size, mode)


def _items(value: object) -> list[Any]:
    """A list as it is, one value as a list of it, nothing as an empty one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
