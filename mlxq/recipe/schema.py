"""The schema of a recipe file, and its faults in our words. Descriptions are what an editor shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from mlxq.methods.formats import AFFINE, ALL_BITS, ALL_GROUP_SIZES, MODES
from mlxq.methods.registry import METHOD_NAMES, described
from mlxq.recipe.draft import kind_of
from mlxq.recipe.model import Calibration
from mlxq.recipe.yaml import KeyPath
from mlxq.tensors import DTYPE_BY_NAME


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _as_slices(value: object) -> object:
    # A bare 3 in YAML is a number; as a slice it is text.
    listed = value if isinstance(value, list) else [value]
    return [str(item) if isinstance(item, int) and not isinstance(item, bool) else item for item in listed]


def _one_or_more(*types: str) -> dict[str, Any]:
    item: dict[str, Any] = {"type": list(types)} if len(types) > 1 else {"type": types[0]}
    return {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}


_MOST_BITS = 32  # of a weight that is not quantized at all
_MOST_TOKENS = 1_000_000_000
MOST_GATES = 100

_Bits = Annotated[int, Field(description="Bits per weight.", json_schema_extra={"enum": list(ALL_BITS)})]
_GroupSize = Annotated[
    int,
    Field(description="Weights of a row that share one scale.", json_schema_extra={"enum": list(ALL_GROUP_SIZES)}),
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


class FormatModel(_Model):
    """How weights are stored. Bits and group size default to the mode's own (affine: 4 and 64)."""

    model_config = ConfigDict(title="Format")

    bits: _Bits = 4
    group_size: _GroupSize = 64
    mode: _Mode = AFFINE.name


def _rule_schema(schema: dict[str, Any]) -> None:
    _without_null(schema)
    schema["anyOf"] = [{"required": [key]} for key in ("bits", "group_size", "mode", "keep")]


class RuleModel(_Model):
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
    mode: _Mode = AFFINE.name
    keep: bool = Field(default=False, description="Do not quantize: stay in dtype.")
    optional: bool = Field(default=False, description="Matching nothing is no fault.")


def _as_formats(value: object) -> object:
    """A bare number of bits in ``options`` stands for affine at that width."""
    if not isinstance(value, list):
        return value
    return [{"bits": item} if isinstance(item, int) and not isinstance(item, bool) else item for item in value]


class FitsModel(_Model):
    """A device that the model must run on."""

    model_config = ConfigDict(title="Fits")

    device: str = Field(min_length=1, description="A device of `mlxq inspect --device`, or this-machine.")
    context: int = Field(
        default=8192, gt=0, le=_MOST_TOKENS, description="Tokens of context that must fit beside the weights."
    )


class BudgetModel(_Model):
    """What the weight files may take: one of size, bpw and fits."""

    model_config = ConfigDict(title="Budget")

    size: str = Field(default="", min_length=1, description="Of the weight files, such as 2.2GB or 900MiB.")
    bpw: float = Field(
        default=0.0,
        gt=0,
        le=_MOST_BITS,
        allow_inf_nan=False,
        description="Bits per weight over all parameters, such as 4.25.",
    )
    fits: FitsModel = Field(default=FitsModel(device="this-machine"), description="Derived from a device's memory.")


class CalibrationModel(_Model):
    """The text that shows what each module's inputs look like."""

    model_config = ConfigDict(title="Calibration")

    text: _OneOrMorePatterns = Field(
        default=["builtin"],
        description="builtin, self (sampled from the model), none (weights alone), or text files.",
    )
    tokens: int = Field(
        default=Calibration.tokens, ge=1024, le=_MOST_TOKENS, description="Most tokens taken from the text."
    )


class UploadModel(_Model):
    """Where the result is published, once its gates have passed."""

    model_config = ConfigDict(title="Upload")

    repo: str = Field(description="org/name on the Hub; created where there is none.")
    private: bool = Field(default=False, description="Create it so that only its owners see it.")
    revision: str = Field(default="", min_length=1, description="Branch to put it on; made where there is none.")
    create_pr: bool = Field(default=False, description="Open a pull request instead.")
    collection: str = Field(default="", min_length=1, description="Add it to this collection.")
    message: str = Field(default="", min_length=1, description="Message of the commit.")


class RecipeModel(_Model):
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
    default: FormatModel = Field(
        default=FormatModel(),
        description="Of every module no rule matches. Left out: those are not quantized.",
    )
    rules: list[RuleModel] = Field(default=[], description="First match wins.")
    budget: BudgetModel = Field(
        default=BudgetModel(bpw=4.5),
        description="What every module no rule matches may take together; formats are chosen to lose least.",
    )
    options: Annotated[
        list[FormatModel],
        Field(min_length=2, description="Formats a budget chooses from: bits, or a mapping as in default."),
        BeforeValidator(_as_formats),
        WithJsonSchema(
            {"type": "array", "minItems": 2, "items": {"anyOf": [{"enum": sorted(AFFINE.bits)}, {"type": "object"}]}}
        ),
    ] = []
    method: str = Field(
        default="",
        description=f"How weights are chosen: {described()}. rtn unless there is a budget, then auto.",
        json_schema_extra={"enum": list(METHOD_NAMES)},
    )
    calibration: CalibrationModel = Field(
        default=CalibrationModel(), description="Text for fit, gptq and budgets; the shipped corpus unless said."
    )
    strict: bool = Field(default=False, description="Fail where no group size divides a width, rather than fall back.")
    gates: list[str] = Field(
        default=[],
        max_length=MOST_GATES,
        description="What the result must measure against the original, such as kl_mean<0.05; else exit code 3.",
    )
    upload: UploadModel = Field(
        default=UploadModel(repo=""), description="Publish the result, once its gates have passed."
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, for editors."""
    schema = RecipeModel.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


@dataclass(frozen=True)
class SchemaFault:
    """A value that the schema refuses. ``known``: its key is unknown, and these may stand there."""

    path: KeyPath
    message: str
    known: tuple[str, ...] = ()


def schema_faults(data: Mapping[str, Any]) -> Iterator[SchemaFault]:
    """What is of the wrong type, out of range, missing or unknown in a recipe."""
    try:
        RecipeModel.model_validate(data)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            path = error["loc"]
            if error["type"] == "extra_forbidden":
                yield SchemaFault(path, "unknown key", _known_keys(path))
            elif error["type"] == "missing":
                yield SchemaFault(path, f"needs the key {path[-1]!r}")
            else:
                yield SchemaFault(path, fault_message(error["type"], error["input"], error.get("ctx", {})))


_MUST_BE = {
    "string_type": "text",
    "string_unicode": "text",
    "int_type": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
}
_EMPTY = "is empty; delete the key or give it a value"
_BOUNDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "greater_than": lambda bound: f"more than {bound['gt']:,.10g}",
    "greater_than_equal": lambda bound: f"at least {bound['ge']:,.10g}",
    "less_than_equal": lambda bound: f"at most {bound['le']:,.10g}",
}


def fault_message(kind: str, value: object, bounds: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words: ``kind`` is its type, ``bounds`` the numbers it names."""
    if kind == "string_too_short" or (kind == "too_short" and not value):
        return _EMPTY
    if value is None:
        return "has no value; delete the key or give it one"
    if kind == "too_short":
        return f"needs at least {bounds['min_length']}, not {bounds['actual_length']}"
    if kind == "too_long":
        return f"may hold {bounds['max_length']:,}, not {bounds['actual_length']:,}"
    if kind in _BOUNDS:
        return f"must be {_BOUNDS[kind](bounds)}, not {kind_of(value)}"
    if kind in _MUST_BE:
        return f"must be {_MUST_BE[kind]}, not {kind_of(value)}"
    return f"can't be {kind_of(value)}; docs/recipes.md says what goes here"


_KEYS: dict[KeyPath, tuple[str, ...]] = {
    (): tuple(RecipeModel.model_fields),
    ("default",): tuple(FormatModel.model_fields),
    ("budget",): tuple(BudgetModel.model_fields),
    ("budget", "fits"): tuple(FitsModel.model_fields),
    ("calibration",): tuple(CalibrationModel.model_fields),
    ("upload",): tuple(UploadModel.model_fields),
}
_KEYS_OF_ITEMS: dict[str | int, tuple[str, ...]] = {
    "rules": tuple(RuleModel.model_fields),
    "options": tuple(FormatModel.model_fields),
}


def _known_keys(path: KeyPath) -> tuple[str, ...]:
    """The keys that may stand beside the one at ``path``."""
    around = path[:-1]
    return _KEYS.get(around) or _KEYS_OF_ITEMS[around[0]]
