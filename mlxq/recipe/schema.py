"""The schema of a recipe file: what pydantic checks and editors show. Descriptions are what an editor shows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from mlxq.methods.formats import AFFINE, ALL_BITS, ALL_GROUP_SIZES, MODES
from mlxq.methods.registry import METHOD_NAMES, described
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
    context: int = Field(default=8192, gt=0, description="Tokens of context that must fit beside the weights.")


class BudgetModel(_Model):
    """What the weight files may take: one of size, bpw and fits."""

    model_config = ConfigDict(title="Budget")

    size: str = Field(default="", min_length=1, description="Of the weight files, such as 2.2GB or 900MiB.")
    bpw: float = Field(default=0.0, gt=0, description="Bits per weight over all parameters, such as 4.25.")
    fits: FitsModel = Field(default=FitsModel(device="this-machine"), description="Derived from a device's memory.")


class CalibrationModel(_Model):
    """The text that shows what each module's inputs look like."""

    model_config = ConfigDict(title="Calibration")

    text: _OneOrMorePatterns = Field(
        default=["builtin"],
        description="builtin, self (sampled from the model), none (weights alone), or text files.",
    )
    tokens: int = Field(default=16384, ge=1024, description="Most tokens taken from the text.")


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
        description="What the result must measure against the original, such as kl_mean<0.05; else exit code 3.",
    )
    upload: UploadModel = Field(
        default=UploadModel(repo=""), description="Publish the result, once its gates have passed."
    )
