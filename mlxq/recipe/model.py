"""What a recipe is once it is read: rules, a budget, calibration text, gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlxq.methods.formats import Format
from mlxq.methods.registry import uses_text
from mlxq.recipe.target import Target


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

    def resolved(self) -> dict[str, Any]:
        """As a recipe writes it."""
        data: dict[str, Any] = {"match": list(self.patterns)}
        if self.layers is not None:
            data["layers"] = list(self.layers)
        data |= {"keep": True} if self.format is None else self.format.as_config()
        if self.optional:
            data["optional"] = True
        return data


@dataclass(frozen=True)
class Budget:
    """What the weights may take: bytes of the weight files, bits per weight, or what a device has room for."""

    size_bytes: int | None
    bpw: float | None
    device: str | None
    context: int
    """Tokens that ``device`` must hold beside the weights."""

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
            "rules": [rule.resolved() for rule in self.rules],
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
