"""The shape of a ``mlxq.json``: what must be in it for cards, charts, uploads and rebuilding to be drawn from it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mlxq.methods.formats import Format, fault_of

# What fits a file system's 64 bits; larger is no size.
_Size = Annotated[int, Field(ge=0, lt=1 << 63)]
_Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e300, le=1e300)]


class _Part(BaseModel):
    # A field more is no fault: a later mlxq may know it. A text for a number is one.
    model_config = ConfigDict(strict=True, extra="allow")


class _Source(_Part):
    name: str
    kind: str
    base_model: str | None
    revision: str | None
    headers_sha256: str


class _Recipe(_Part):
    name: str
    text: str
    resolved: dict[str, Any]


class _Module(_Part):
    path: str
    shape: list[_Size]
    dtype: str
    format: dict[str, Any] | None
    nbytes: _Size
    method: str = ""

    @field_validator("format")
    @classmethod
    def _known(cls, entry: dict[str, Any] | None) -> dict[str, Any] | None:
        if entry is not None:
            fmt = Format.from_config(entry)
            fault = fault_of(fmt.mode, fmt.bits, fmt.group_size)
            if fault is not None:
                raise ValueError(fault)
        return entry


class _LeftOut(_Part):
    ability: str | None


class _Metrics(_Part):
    size_bytes: _Size
    source_bytes: _Size
    bits_per_weight: _Number


class _File(_Part):
    bytes: _Size
    sha256: str


class _Text(_Part):
    name: str
    tokens: _Size
    sha256: str


class _Timing(_Part):
    device: str


class _Histogram(_Part):
    edges: list[_Number]
    counts: list[_Size]

    @field_validator("counts")
    @classmethod
    def _counted(cls, counts: list[int]) -> list[int]:
        if len(counts) > 10_000:
            raise ValueError("it has more bars than a chart can show")
        return counts


class _Comparison(_Part):
    name: str
    verdict: str
    text: _Text
    metrics: dict[str, _Number | None]
    nan: list[str]
    notes: list[str]
    layer_bits: dict[str, _Number] = {}
    noise_floor_kl_mean: _Number | None = None
    timing: _Timing | None = None
    kl_histogram: _Histogram | None = None


class _Point(_Part):
    weight_bytes: _Size
    predicted_kl: _Number
    measured_kl: _Number | None
    measured_kl_se: _Number | None


class _Check(_Part):
    name: str
    weight_bytes: _Size
    kl_mean: _Number
    chosen: bool


class _Budget(_Part):
    text: dict[str, Any] | None
    checks: list[_Check]
    curve: list[_Point]


class _Card(_Part):
    tags: list[str] = []


class _Report(_Part):
    versions: dict[str, str]
    source: _Source
    recipe: _Recipe
    options: dict[str, bool]
    modules: list[_Module]
    left_out: list[_LeftOut] = []
    notes: list[str]
    budget: _Budget | None = None
    card: _Card | None = None
    metrics: _Metrics
    files: dict[str, _File]
    comparison: _Comparison | None = None


def fault_of_report(report: dict[str, Any]) -> str | None:
    """The first thing in ``report`` that is not what it must be, and where; None where all is."""
    try:
        _Report.model_validate(report)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        more = f" (and {exc.error_count() - 1:,} more)" if exc.error_count() > 1 else ""
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{more}"
    return None
