"""Recipes: the schema, and what a file, what it extends and ``--set`` come to together."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from mlxq.errors import RecipeError
from mlxq.gates import gate_fault
from mlxq.match import pattern_fault, slice_fault
from mlxq.methods.formats import MODES, Format, fault_of
from mlxq.recipe_yaml import Document, KeyPath, heading, parse_value, read_document
from mlxq.target import Target, target_faults
from mlxq.tensors import DTYPE_BY_NAME


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


def shipped_recipes() -> tuple[Recipe, ...]:
    """The recipes that come with mlxq, by name."""
    return tuple(load_recipe(path.stem) for path in sorted(_shipped_folder().glob("*.yaml")))


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors."""
    schema = _RecipeModel.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# The schema. Descriptions are what an editor shows.


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _as_slices(value: object) -> object:
    # A bare 3 in YAML is a number; as a slice it is text.
    listed = value if isinstance(value, list) else [value]
    return [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in listed]


def _one_or_more(*types: str) -> dict[str, Any]:
    item: dict[str, Any] = {"type": list(types)} if len(types) > 1 else {"type": types[0]}
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


_ALL_BITS = sorted({bits for all_bits, _ in MODES.values() for bits in all_bits})
_ALL_GROUPS = sorted({group for _, groups in MODES.values() for group in groups})

_Bits = Annotated[int, Field(description="Bits per weight.", json_schema_extra={"enum": list(_ALL_BITS)})]
_GroupSize = Annotated[
    int,
    Field(description="Weights of a row that share one scale.", json_schema_extra={"enum": list(_ALL_GROUPS)}),
]
_Mode = Annotated[
    str,
    Field(description="How weights are encoded; affine unless said.", json_schema_extra={"enum": [*MODES]}),
]
_OneOrMorePatterns = Annotated[
    list[str], Field(min_length=1), BeforeValidator(_as_list), WithJsonSchema(_one_or_more("string"))
]
_OneOrMoreSlices = Annotated[
    list[str],
    Field(min_length=1),
    BeforeValidator(_as_slices),
    WithJsonSchema(_one_or_more("string", "integer")),
]


def _without_null(schema: dict[str, Any]) -> None:
    """Leave optional keys out of a recipe or give them a value: null is a fault, so say so to editors."""
    for prop in schema.get("properties", {}).values():
        prop.pop("default", None)
        prop.pop("title", None)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_without_null)


class _FormatModel(_Model):
    """How weights are stored. Bits and group size default to the mode's own (affine: 4 and 64)."""

    model_config = ConfigDict(title="Format")

    bits: _Bits = 4
    group_size: _GroupSize = 64
    mode: _Mode = "affine"


def _rule_schema(schema: dict[str, Any]) -> None:
    _without_null(schema)
    schema["anyOf"] = [{"required": [key]} for key in ("bits", "group_size", "mode", "keep")]


class _RuleModel(_Model):
    """What happens to the modules it matches. The first rule that matches a module decides."""

    model_config = ConfigDict(title="Rule", json_schema_extra=_rule_schema)

    match: _OneOrMorePatterns = Field(
        description="Module path or its last components (v_proj, mlp.down_proj), a glob over the whole path "
        "(*.mlp.gate), or re: and a full-match regular expression."
    )
    layers: _OneOrMoreSlices = Field(
        default=[],
        description="Only in these layers: Python slices over the layer index or single indices; a bound may "
        "be arithmetic over n, the number of layers (n//8+2::3).",
    )
    bits: _Bits = 4
    group_size: _GroupSize = 64
    mode: _Mode = "affine"
    keep: bool = Field(default=False, description="Do not quantize: stay in dtype.")
    optional: bool = Field(default=False, description="Matching nothing is no fault.")


class _UploadModel(_Model):
    """Where the result is published, once its gates have passed."""

    model_config = ConfigDict(title="Upload")

    repo: str = Field(description="org/name on the Hub; created where there is none.")
    private: bool = Field(default=False, description="Create it so that only its owners see it.")
    revision: str = Field(default="", min_length=1, description="Branch to put it on; made where there is none.")
    create_pr: bool = Field(default=False, description="Open a pull request instead.")
    collection: str = Field(default="", min_length=1, description="Add it to this collection.")
    message: str = Field(default="", min_length=1, description="Message of the commit.")


class _RecipeModel(_Model):
    """How mlxq stores each part of a model."""

    model_config = ConfigDict(title="mlxq recipe")

    extends: str = Field(
        default="", min_length=1, description="A shipped recipe's name, or a file relative to this one."
    )
    model: str = Field(
        default="",
        min_length=1,
        description="Folder, Hub id with an optional @revision, .gguf file, or sample.",
    )
    output: str = Field(default="", min_length=1, description="Folder to write.")
    dtype: str = Field(
        default="",
        description="Of what is not quantized; the source's unless said.",
        json_schema_extra={"enum": list(DTYPE_BY_NAME)},
    )
    default: _FormatModel = Field(
        default=_FormatModel(),
        description="Of every module no rule matches. Left out: those are not quantized.",
    )
    rules: list[_RuleModel] = Field(default=[], description="First match wins.")
    strict: bool = Field(default=False, description="Fail where no group size divides a width, rather than fall back.")
    gates: list[str] = Field(
        default=[],
        description="What the result must measure against the original, such as kl_mean<0.05; else exit code 3.",
    )
    upload: _UploadModel = Field(
        default=_UploadModel(repo=""), description="Publish the result, once its gates have passed."
    )


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
    package = Path(__file__).parent
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
        strict=data.get("strict", False),
        gates=tuple(gates),
        upload=upload,
        text="",
        description="",
    )


def _upload(draft: _Draft, faults: list[_Fault]) -> Target | None:
    """Where to publish, or None. Values of the wrong type are the schema's to report."""
    raw = draft.data.get("upload")
    if not isinstance(raw, dict):
        return None
    known = {key: value for key, value in raw.items() if key in _UploadModel.model_fields}
    try:
        target = Target(**_UploadModel.model_validate(known).model_dump(exclude_unset=True))
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
    mode = raw.get("mode", base.mode if base else "affine")
    if not isinstance(mode, str):
        return None
    if mode not in MODES:
        message = f"unknown mode {mode!r}; MLX has {', '.join(MODES)}{_suggest(mode, MODES)}"
        faults.append(_Fault(draft.origin((*at, "mode")), message))
        return None
    same = base if base and base.mode == mode else Format(MODES[mode][0][0], MODES[mode][1][0], mode)
    bits, group_size = raw.get("bits", same.bits), raw.get("group_size", same.group_size)
    if not _is_whole(bits) or not _is_whole(group_size):
        return None
    # Asked one at a time, so that both wrong is two faults.
    bits_fault = fault_of(mode, bits, MODES[mode][1][0])
    group_fault = fault_of(mode, MODES[mode][0][0], group_size)
    inherits = (
        "" if "mode" in raw or mode == "affine" else f" (mode is the default's; say `mode: affine` for {bits} bits)"
    )
    if bits_fault:
        faults.append(_Fault(draft.origin((*at, "bits")), bits_fault + inherits))
    if group_fault:
        faults.append(_Fault(draft.origin((*at, "group_size")), group_fault))
    return None if bits_fault or group_fault else Format(bits, group_size, mode)


def _schema_faults(draft: _Draft) -> list[_Fault]:
    try:
        _RecipeModel.model_validate(draft.data)
    except ValidationError as errors:
        return [
            _Fault(draft.origin(error["loc"]), _schema_message(error["type"], error["loc"], error))
            for error in errors.errors(include_url=False)
        ]
    return []


_MUST_BE = {
    "string_type": "text",
    "int_type": "a whole number",
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
    models: dict[KeyPath, type[BaseModel]] = {(): _RecipeModel, ("default",): _FormatModel, ("upload",): _UploadModel}
    return list(models.get(loc[:-1], _RuleModel).model_fields)


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
