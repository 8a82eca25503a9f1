"""Recipes: the schema, and what a file, what it extends and ``--set`` come to together."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mlxq.errors import RecipeError
from mlxq.methods.formats import AFFINE, MODES, Format, fault_of
from mlxq.methods.registry import AUTO, METHOD_NAMES, needs_text, uses_text
from mlxq.methods.rtn import RTN
from mlxq.recipe.gates import gate_fault
from mlxq.recipe.match import pattern_fault, slice_fault
from mlxq.recipe.schema import (
    BudgetModel,
    CalibrationModel,
    FitsModel,
    FormatModel,
    RecipeModel,
    RuleModel,
    UploadModel,
)
from mlxq.recipe.target import Target, target_faults
from mlxq.recipe.yaml import Document, KeyPath, heading, parse_value, read_document
from mlxq.tensors import DTYPE_BY_NAME, parse_size


@dataclass(frozen=True)
class Rule:
    """What happens to the modules that ``patterns`` match; the first rule that matches a module decides."""

    patterns: tuple[str, ...]
    layers: tuple[str, ...] | None
    """Slices over the layer index; None means everywhere, also outside the layers."""
    format: Format | None
    """None keeps the module in the recipe's dtype."""
    optional: bool
    """Matching nothing is fine."""
    where: str = field(compare=False)
    """Where it was written, for messages: ``recipe.yaml:12 rules[1]``."""
    inherited: bool = field(default=False, compare=False)
    """It comes from what the recipe extends, so rules before it may take all it matches."""


@dataclass(frozen=True)
class Budget:
    """What the weights may take: bytes of the weight files, bits per weight, or what a device has room for."""

    size_bytes: int | None
    bpw: float | None
    device: str | None
    context: int

    def __str__(self) -> str:
        if self.size_bytes is not None:
            return f"{self.size_bytes / 1e6:,.1f} MB"
        return f"{self.bpw:g} bits per weight" if self.bpw else f"{self.device} with {self.context:,} tokens of context"

    def resolved(self) -> dict[str, Any]:
        """As a recipe writes it."""
        if self.size_bytes is not None:
            return {"size": f"{self.size_bytes}B"}
        return {"bpw": self.bpw} if self.bpw else {"fits": {"device": self.device, "context": self.context}}


@dataclass(frozen=True)
class Calibration:
    """The text behind statistics and sensitivities: ``texts`` are files, or one of builtin, self, none."""

    texts: tuple[str, ...] = ("builtin",)
    tokens: int = 16384

    @property
    def has_text(self) -> bool:
        """Whether there is any: ``none`` means weights alone."""
        return self.texts != ("none",)


# What a budget chooses from where the recipe does not say.
DEFAULT_OPTIONS = (
    Format(2, 64),
    Format(3, 64),
    Format(3, 32),
    Format(4, 64),
    Format(4, 32),
    Format(5, 64),
    Format(6, 64),
    Format(8, 64),
)


@dataclass(frozen=True)
class Recipe:
    """A recipe after ``extends`` and ``--set``, checked as far as it can be without a model."""

    name: str
    """Name of a shipped recipe, or the stem of the file."""
    path: str | None = field(compare=False)
    model: str | None
    output: str | None
    dtype: str | None
    """``bfloat16``, ``float16`` or ``float32``; None is the source's."""
    default: Format | None
    """None quantizes nothing that no rule mentions."""
    rules: tuple[Rule, ...]
    budget: Budget | None
    """What the modules that no rule matches may take; None where ``default`` decides."""
    options: tuple[Format, ...]
    """What a budget chooses from."""
    method: str
    """``rtn``, ``fit``, ``gptq`` or ``auto``."""
    calibration: Calibration
    strict: bool
    """A width that no group size divides is an error, not a reason to fall back."""
    gates: tuple[str, ...]
    """What the result must measure, such as ``kl_mean<0.05``."""
    upload: Target | None = field(compare=False)
    """Where to publish the result. No part of how it is made: whoever makes it again does not publish it there."""
    text: str = field(compare=False)
    """The YAML as it was written."""
    description: str = field(compare=False)
    """The comment at the top of the file."""

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with nothing left out; ``recipe_from_dict`` gives an equal recipe."""
        data: dict[str, Any] = {
            "model": self.model,
            "output": self.output,
            "dtype": self.dtype,
            "default": None if self.default is None else self.default.as_config(),
            "rules": [_resolved_rule(rule) for rule in self.rules],
            "budget": self.budget.resolved() if self.budget else None,
            "options": [fmt.as_config() for fmt in self.options] if self.budget else None,
            "method": self.method,
            "calibration": {"text": list(self.calibration.texts), "tokens": self.calibration.tokens}
            if self.budget is not None or uses_text(self.method)
            else None,
            "strict": self.strict,
            "gates": list(self.gates),
        }
        return {key: value for key, value in data.items() if value is not None}


def load_recipe(ref: str | Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or the shipped recipe of that name, with what it extends and ``sets`` applied.

    ``sets`` are ``PATH=VALUE`` strings (``default.bits=3``, ``rules.0.keep=true``), each value read as YAML,
    applied after ``extends``. Raises RecipeError with every fault of the recipe at once.
    """
    faults: list[_Fault] = []
    path = _find(ref, Path(), _AT_COMMAND_LINE, faults)
    if path is None:
        raise RecipeError(_render(faults))
    label = path.name if _is_shipped(path) else str(ref)
    document = read_document(path)
    draft = _draft(document, path, label, (), faults)
    for text in sets:
        _set(draft, text, faults)
    recipe = _build(draft, path.stem, faults)
    return replace(recipe, path=str(path), text=document.text, description=heading(document.text))


def recipe_from_dict(data: Mapping[str, Any], name: str) -> Recipe:
    """The recipe that ``Recipe.resolved`` recorded. Raises RecipeError with every fault at once.

    Its rules count as inherited: what they came to was settled when they were recorded.
    """
    faults: list[_Fault] = []
    origin = _Origin(name, None, "", 0)
    if "extends" in data:
        faults.append(_Fault(replace(origin, path="extends"), "a resolved recipe extends nothing"))
    plain = {key: value for key, value in data.items() if key != "extends"}
    recipe = _build(_Draft(plain, _origins_of(plain, name), own_rules=0), name, faults)
    text = yaml.safe_dump(plain, sort_keys=False)
    return replace(recipe, text=text)


def budget_recipe(budget: Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
    """The recipe of a budget alone, such as ``{"bpw": 4.25}``, with ``sets`` applied; named after the budget.

    Raises RecipeError with every fault at once.
    """
    faults: list[_Fault] = []
    name = str(budget["size"]) if "size" in budget else f"{budget['bpw']:g}bpw"
    data: dict[str, Any] = {"budget": dict(budget)}
    draft = _Draft(data, _origins_of(data, name), own_rules=0)
    for text in sets:
        _set(draft, text, faults)
    return replace(_build(draft, name, faults), text=yaml.safe_dump(draft.data, sort_keys=False))


def names_recipe(text: str) -> bool:
    """Does an argument name a recipe? A YAML file, or a shipped recipe's name where no such path exists."""
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return True
    return not path.exists() and (_shipped_folder() / f"{text}.yaml").is_file()


def shipped_recipes() -> tuple[Recipe, ...]:
    """The recipes that come with mlxq, by name."""
    return tuple(load_recipe(path.stem) for path in sorted(_shipped_folder().glob("*.yaml")))


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors."""
    schema = RecipeModel.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# Where a value came from, so that each fault can say so.


@dataclass(frozen=True)
class _Origin:
    """Where a value was written: a file and line, or ``--set``; ``path`` is the path to it there."""

    label: str
    line: int | None
    path: str
    rank: int
    """Faults are shown file by file: the recipe, what it extends, then ``--set``."""

    @property
    def place(self) -> str:
        return self.label if self.line is None else f"{self.label}:{self.line}"


@dataclass(frozen=True)
class _Fault:
    origin: _Origin
    message: str

    def __str__(self) -> str:
        path = f"{self.origin.path}: " if self.origin.path else ""
        return f"{self.origin.place}: {path}{self.message}"


@dataclass
class _Draft:
    """A recipe on its way to being one: data, where each part came from, how many rules are its own."""

    data: dict[str, Any]
    origins: dict[KeyPath, _Origin]
    own_rules: int

    def origin(self, path: KeyPath) -> _Origin:
        """Of the value at ``path``, or of the closest thing around it that was written."""
        while path not in self.origins and path:
            path = path[:-1]
        return self.origins[path]


_AT_COMMAND_LINE = _Origin("", None, "", 0)
_AFTER_ALL_FILES = 1000


def _show(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _render(faults: Sequence[_Fault]) -> tuple[str, ...]:
    ordered = sorted(faults, key=lambda fault: (fault.origin.rank, fault.origin.line or 0))
    return tuple(dict.fromkeys(str(fault).removeprefix(": ") for fault in ordered))


def _origins_of(data: Mapping[str, Any], label: str) -> dict[KeyPath, _Origin]:
    """Origins of data that came without lines."""
    origins: dict[KeyPath, _Origin] = {}

    def visit(value: object, path: KeyPath) -> None:
        origins[path] = _Origin(label, None, _show(path), 0)
        if isinstance(value, Mapping):
            for key, child in value.items():
                visit(child, (*path, key))
        elif isinstance(value, list):
            for index, child in enumerate(value):
                visit(child, (*path, index))

    visit(data, ())
    return origins


# Files: finding, extending, overriding.


def _shipped_folder() -> Path:
    """In the package where it is installed, beside it in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _is_shipped(path: Path) -> bool:
    return path.parent == _shipped_folder()


def _find(ref: str | Path, folder: Path, origin: _Origin, faults: list[_Fault]) -> Path | None:
    """The file of a shipped recipe's name or of a path relative to ``folder``; else None and a fault."""
    shipped = {file.stem: file for file in sorted(_shipped_folder().glob("*.yaml"))}
    if isinstance(ref, str) and ref in shipped:
        return shipped[ref]
    if not str(ref).strip():
        faults.append(_Fault(origin, "the recipe's name is empty"))
        return None
    path = folder / Path(ref)
    # os.path: a name too long for the file system, or with a NUL in it, is one that does not exist.
    if os.path.exists(path):
        return path
    if path.suffix in (".yaml", ".yml") or len(Path(ref).parts) > 1:
        faults.append(_Fault(origin, f"no such recipe file: {path}"))
    else:
        near = _suggest(str(ref), shipped) or f"; shipped ones are {', '.join(shipped)}"
        faults.append(_Fault(origin, f"no recipe is called {str(ref)!r}{near}"))
    return None


def _draft(document: Document, path: Path, label: str, above: tuple[Path, ...], faults: list[_Fault]) -> _Draft:
    """A document on top of all that it extends. ``above`` are the files that led to this one."""
    rank = len(above)
    faults += [_Fault(_Origin(label, f.line, _show(f.path), rank), f.message) for f in document.faults]
    origins = {at: _Origin(label, line, _show(at), rank) for at, line in document.lines.items()}
    origins[()] = _Origin(label, None, "", rank)
    rules = document.data.get("rules")
    draft = _Draft(dict(document.data), origins, own_rules=len(rules) if isinstance(rules, list) else 0)
    ref = draft.data.get("extends")
    if not isinstance(ref, str) or not ref:
        return draft  # absent, or of a type that the schema will refuse
    del draft.data["extends"]
    parent_path = _find(ref, path.parent, draft.origin(("extends",)), faults)
    if parent_path is None:
        return draft
    chain = (*above, path.resolve())
    if parent_path.resolve() in chain:
        names = " -> ".join(p.name for p in (*chain[chain.index(parent_path.resolve()) :], parent_path))
        faults.append(_Fault(draft.origin(("extends",)), f"recipes extend each other in a circle: {names}"))
        return draft
    parent_label = parent_path.name if _is_shipped(parent_path) else str(parent_path)
    parent = _draft(read_document(parent_path), parent_path, parent_label, chain, faults)
    return _merged(draft, parent)


def _merged(child: _Draft, parent: _Draft) -> _Draft:
    """The child's keys replace the parent's; its rules come before the parent's."""
    data = {**parent.data, **child.data}
    origins = {at: origin for at, origin in parent.origins.items() if at[:1] and at[0] not in child.data}
    origins |= child.origins
    own, inherited = child.data.get("rules"), parent.data.get("rules")
    if isinstance(own, list) and isinstance(inherited, list):
        data["rules"] = own + inherited
        for at, origin in parent.origins.items():
            if len(at) > 1 and at[0] == "rules" and isinstance(at[1], int):
                origins[("rules", at[1] + len(own), *at[2:])] = origin
    return _Draft(data, origins, child.own_rules)


def _set(draft: _Draft, text: str, faults: list[_Fault]) -> None:
    """Apply one ``PATH=VALUE``. What it sets is checked with everything else afterwards."""
    dotted, equals, value_text = text.partition("=")
    origin = _Origin(f"--set {text}", None, "", _AFTER_ALL_FILES)
    keys = re.sub(r"\[(\d+)\]", r".\1", dotted.strip()).split(".")
    if not equals or not all(keys):
        faults.append(_Fault(origin, "write it as PATH=VALUE, such as default.bits=3 or rules.0.keep=true"))
        return
    if keys[0] == "extends":
        faults.append(_Fault(origin, "extends can't be set; name the other recipe instead of this one"))
        return
    try:
        value = parse_value(value_text)
    except ValueError as error:
        faults.append(_Fault(origin, f"the value {error}"))
        return
    path, fault = _put(draft.data, keys, value)
    if fault:
        faults.append(_Fault(origin, fault))
        return
    draft.origins = {at: o for at, o in draft.origins.items() if at[: len(path)] != path}
    for end in range(1, len(path) + 1):  # a mapping on the way may be new too
        draft.origins.setdefault(path[:end], replace(origin, path=_show(path[:end])))
    if path == ("rules",) and isinstance(value, list):
        draft.own_rules = len(value)


def _put(data: dict[str, Any], keys: Sequence[str], value: Any) -> tuple[KeyPath, str | None]:
    """Put ``value`` at ``keys``: the path that was written (a mapping on the way may be new), or a fault."""
    draft = copy.deepcopy(data)
    here: Any = draft
    path: KeyPath = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                count = f"{len(here)} (0 to {len(here) - 1})" if here else "none"
                return path, f"{_show(path)} has no item {key!r}; there are {count}"
            path = (*path, int(key))
            if last:
                here[int(key)] = value
            here = here[int(key)]
        elif isinstance(here, dict):
            path = (*path, key)
            if last:
                here[key] = value
            elif key not in here:
                if key == "rules":
                    return path, "there are no rules to set; write rules in the recipe"
                here[key] = {}
            here = here[key]
        else:
            return path, f"{_show(path)} is {_kind(here)}; it has no {key!r}"
    data.clear()
    data.update(draft)
    return path, None


# Checking.


def _build(draft: _Draft, name: str, faults: list[_Fault]) -> Recipe:
    """The recipe a draft comes to, or RecipeError with ``faults`` and all the draft's own."""
    faults = [*faults, *_schema_faults(draft)]
    data = draft.data
    if "dtype" in data and isinstance(data["dtype"], str) and data["dtype"] not in DTYPE_BY_NAME:
        near = _suggest(data["dtype"], DTYPE_BY_NAME)
        message = f"unknown dtype {data['dtype']!r}; known are {', '.join(DTYPE_BY_NAME)}{near}"
        faults.append(_Fault(draft.origin(("dtype",)), message))
    default = None
    if isinstance(data.get("default"), dict):
        default = _format(draft, ("default",), data["default"], None, faults)
    listed = data.get("rules")
    raw_rules = listed if isinstance(listed, list) else []
    rules = [_rule(draft, index, raw, default, faults) for index, raw in enumerate(raw_rules) if isinstance(raw, dict)]
    budget = _budget(draft, faults)
    method = _method(draft, faults)
    options = [
        _format(draft, ("options", index), {"bits": raw} if _is_whole(raw) else raw, None, faults)
        for index, raw in enumerate(_listed(data.get("options")))
        if _is_whole(raw) or isinstance(raw, dict)
    ]
    calibration = _calibration(draft, method, faults)
    gates = [text for text in _listed(data.get("gates")) if isinstance(text, str)]
    for index, text in enumerate(gates):
        if fault := gate_fault(text):
            faults.append(_Fault(draft.origin(("gates", index)), fault))
    upload = _upload(draft, faults)
    if faults:
        raise RecipeError(_render(faults))
    return Recipe(
        name=name,
        path=None,
        model=data.get("model"),
        output=data.get("output"),
        dtype=data.get("dtype"),
        default=default,
        rules=tuple(rule for rule in rules if rule is not None),
        budget=budget,
        options=tuple(dict.fromkeys(fmt for fmt in options if fmt)) or DEFAULT_OPTIONS,
        method=method,
        calibration=calibration,
        strict=data.get("strict", False),
        gates=tuple(gates),
        upload=upload,
        text="",
        description="",
    )


def _budget(draft: _Draft, faults: list[_Fault]) -> Budget | None:
    """The budget, or None with its faults added."""
    raw = draft.data.get("budget")
    if not isinstance(raw, dict):
        if "options" in draft.data:
            faults.append(_Fault(draft.origin(("options",)), "is what a budget chooses from; add a budget"))
        return None
    if "default" in draft.data:
        message = "the budget decides what default would; delete one (rules still come first)"
        faults.append(_Fault(draft.origin(("default",)), message))
    given = [key for key in BudgetModel.model_fields if key in raw]
    if len(given) != 1:
        faults.append(_Fault(draft.origin(("budget",)), f"needs one of size, bpw and fits, not {len(given)}"))
        return None
    size_bytes = None
    if isinstance(raw.get("size"), str):
        size_bytes = parse_size(raw["size"])
        if size_bytes is None:
            message = f"cannot read the size {raw['size']!r}; write it as 2.2GB, 900MB or 2GiB"
            faults.append(_Fault(draft.origin(("budget", "size")), message))
    fits = raw.get("fits") if isinstance(raw.get("fits"), dict) else {}
    assert fits is not None
    bpw = raw.get("bpw")
    return Budget(
        size_bytes=size_bytes,
        bpw=float(bpw) if isinstance(bpw, (int, float)) else None,
        device=fits.get("device"),
        context=fits.get("context", FitsModel.model_fields["context"].default),
    )


def _method(draft: _Draft, faults: list[_Fault]) -> str:
    method = draft.data.get("method")
    if isinstance(method, str) and method not in METHOD_NAMES:
        message = f"unknown method {method!r}; known are {', '.join(METHOD_NAMES)}{_suggest(method, METHOD_NAMES)}"
        faults.append(_Fault(draft.origin(("method",)), message))
    if isinstance(method, str):
        return method
    return AUTO if "budget" in draft.data else RTN.name


def _calibration(draft: _Draft, method: str, faults: list[_Fault]) -> Calibration:
    raw = draft.data.get("calibration")
    if not isinstance(raw, dict):
        return Calibration()
    origin = draft.origin(("calibration",))
    if method in METHOD_NAMES and not uses_text(method) and "budget" not in draft.data:
        faults.append(_Fault(origin, "nothing uses it: add a budget, or method: fit or gptq"))
    texts = tuple(text for text in _listed(raw.get("text", "builtin")) if isinstance(text, str))
    alone = {"builtin", "self", "none"} & set(texts)
    if len(texts) > 1 and alone:
        faults.append(_Fault(draft.origin(("calibration", "text")), f"{alone.pop()} does not mix with other texts"))
    if texts == ("none",) and method in METHOD_NAMES and needs_text(method):
        message = "gptq feeds errors back along the inputs, so it needs text; fit works without"
        faults.append(_Fault(draft.origin(("calibration", "text")), message))
    tokens = raw.get("tokens", CalibrationModel.model_fields["tokens"].default)
    return Calibration(texts, tokens if _is_whole(tokens) else 0)


def _upload(draft: _Draft, faults: list[_Fault]) -> Target | None:
    """Where to publish, or None. Values of the wrong type are the schema's to report."""
    raw = draft.data.get("upload")
    if not isinstance(raw, dict):
        return None
    known = {key: value for key, value in raw.items() if key in UploadModel.model_fields}
    try:
        target = Target(**UploadModel.model_validate(known).model_dump(exclude_unset=True))
    except ValidationError:
        return None
    found = list(target_faults(target))
    faults += [_Fault(draft.origin(("upload", key)), message) for key, message in found]
    return None if found else target


def _rule(draft: _Draft, index: int, raw: dict[str, Any], default: Format | None, faults: list[_Fault]) -> Rule | None:
    """One rule, or None with its faults added. Values of the wrong type are the schema's to report."""
    at: KeyPath = ("rules", index)
    before = len(faults)
    patterns = [text for text in _listed(raw.get("match")) if isinstance(text, str)]
    slices = [str(text) for text in _listed(raw.get("layers")) if isinstance(text, str) or _is_whole(text)]
    for key, texts, fault_in in (("match", patterns, pattern_fault), ("layers", slices, slice_fault)):
        for position, text in enumerate(texts):
            fault = fault_in(text)
            if fault:
                faults.append(_Fault(draft.origin((*at, key, position)), fault))
    formatted = [key for key in ("bits", "group_size", "mode") if key in raw]
    keep = raw.get("keep") is True
    if keep and formatted:
        message = f"keep: true leaves nothing to quantize; delete it or {' and '.join(formatted)}"
        faults.append(_Fault(draft.origin((*at, "keep")), message))
    if not keep and not formatted:
        message = "does nothing; give it bits, group_size or mode, or keep: true"
        faults.append(_Fault(draft.origin(at), message))
    fmt = _format(draft, at, raw, default, faults)
    if len(faults) > before:
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


def _format(
    draft: _Draft, at: KeyPath, raw: dict[str, Any], base: Format | None, faults: list[_Fault]
) -> Format | None:
    """The format at ``at``; what it leaves out is ``base``'s where the mode is the same, else the mode's."""
    mode = raw.get("mode", base.mode if base else AFFINE.name)
    if not isinstance(mode, str):
        return None
    if mode not in MODES:
        message = f"unknown mode {mode!r}; MLX has {', '.join(MODES)}{_suggest(mode, MODES)}"
        faults.append(_Fault(draft.origin((*at, "mode")), message))
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
        faults.append(_Fault(draft.origin((*at, "bits")), bits_fault + inherits))
    if group_fault:
        faults.append(_Fault(draft.origin((*at, "group_size")), group_fault))
    return None if bits_fault or group_fault else Format(bits, group_size, mode)


def _schema_faults(draft: _Draft) -> list[_Fault]:
    try:
        RecipeModel.model_validate(draft.data)
    except ValidationError as errors:
        return [
            _Fault(draft.origin(error["loc"]), _schema_message(error["type"], error["loc"], error))
            for error in errors.errors(include_url=False)
        ]
    return []


_MUST_BE = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}


def _schema_message(kind: str, loc: KeyPath, error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words."""
    value = error["input"]
    if kind == "extra_forbidden":
        known = _known_keys(loc)
        near = _suggest(str(loc[-1]), known)
        return f"unknown key{near}" if near else f"unknown key; known are {', '.join(known)}"
    if kind == "missing":
        return f"needs the key {loc[-1]!r}"
    if kind in ("too_short", "string_too_short"):
        return "is empty; delete the key or give it a value"
    if value is None:
        return "has no value; delete the key or give it one"
    if kind in _MUST_BE:
        return f"must be {_MUST_BE[kind]}, not {_kind(value)}"
    return str(error["msg"])


def _known_keys(loc: KeyPath) -> list[str]:
    models: dict[KeyPath, type[BaseModel]] = {
        (): RecipeModel,
        ("default",): FormatModel,
        ("budget",): BudgetModel,
        ("budget", "fits"): FitsModel,
        ("calibration",): CalibrationModel,
        ("upload",): UploadModel,
    }
    inside = FormatModel if loc[:1] == ("options",) else RuleModel
    return list(models.get(loc[:-1], inside).model_fields)


def _suggest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _kind(value: object) -> str:
    """A value as a message names it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, (str, int, float)) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(value: object) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _resolved_rule(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"match": list(rule.patterns)}
    if rule.layers is not None:
        data["layers"] = list(rule.layers)
    data |= {"keep": True} if rule.format is None else rule.format.as_config()
    if rule.optional:
        data["optional"] = True
    return data
