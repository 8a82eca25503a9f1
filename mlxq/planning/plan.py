"""Recipe x modules -> what is written, to the byte, before any weight is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlxq.architecture.bind import Architecture, Module, Parameter
from mlxq.errors import BadInputError, RecipeError
from mlxq.headers import encode_header
from mlxq.methods.encode import method_for
from mlxq.methods.formats import TERNARY_PER_BYTE, Format, fallback, layout
from mlxq.recipe.load import Recipe, Rule
from mlxq.recipe.match import Match, assign, matches, names_module
from mlxq.sources.base import ModelSource
from mlxq.tensors import DTYPE_BY_NAME, FLOAT_DTYPES, TensorSpec

# mlx_lm starts a new shard where one would pass 5 GiB.
SHARD_BYTES = 5 << 30

# Who decided, for a module that no rule matched where the recipe has a budget.
BY_BUDGET = "budget"
# Who decided, for a module that the source holds quantized in a format MLX reads.
KEPT_AS_STORED = "as stored in the source"

# What stands for one weight; nvfp4 may have a scale for the whole tensor beside those of its groups.
_QUANTIZED_PARTS = ("weight", "scales", "biases", "global_scale")


@dataclass(frozen=True)
class Decision:
    """What becomes of one module, and why.

    ``format`` None means it stays in ``dtype``. ``by`` says who decided: the default, a rule (with file and line),
    the model, or the source. ``also`` are the rules that matched too; ``asked`` what the model said of it;
    ``note`` what had to be changed (a group size that does not divide the width, a tied head); ``misfit`` whether
    it was the width; ``method`` how its numbers are chosen (``rtn``, ``fit``, ``gptq``).
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    format: Format | None
    quantizable: bool
    by: str
    also: tuple[str, ...]
    asked: str | None
    note: str | None
    misfit: bool
    method: str
    nbytes: int


@dataclass(frozen=True)
class Step:
    """Read one weight, cast it to ``dtype``, encode it, write ``outputs``.

    ``source`` is the checkpoint tensor it is, or None where it must be assembled by ``mlx_lm``'s sanitize.
    ``dequantize`` says that the parameter is stored quantized and is read as numbers; ``repacked`` that its stored
    blocks are carried over bit for bit into an MLX format that holds the same values. ``method`` is how its numbers
    are chosen, ``guided`` that calibration text has a say in it.
    """

    path: str
    spec: TensorSpec
    source: str | None
    format: Format | None
    dequantize: bool
    repacked: bool
    outputs: tuple[TensorSpec, ...]
    method: str = "rtn"
    guided: bool = False


@dataclass(frozen=True)
class Shard:
    """One output file: its header as bytes, and where each tensor's bytes go (absolute offsets)."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything that will be written, known before a weight is read."""

    source: ModelSource
    recipe: Recipe
    architecture: Architecture
    decisions: tuple[Decision, ...]
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    parameter_count: int
    remarks: tuple[str, ...] = ()
    """What a person should know of the whole plan."""
    spending: Mapping[str, Any] | None = None
    """How the budget was spent, as data; None without one."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors written, headers not counted."""
        return sum(spec.nbytes for step in self.steps for spec in step.outputs)

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over the logical parameter count."""
        return self.weight_bytes * 8 / self.parameter_count

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know before it runs, one line each."""
        return (*self.remarks, *(f"{d.path}: {d.note}" for d in self.decisions if d.note))

    def fingerprint(self) -> str:
        """SHA-256 over all that determines the bytes written: headers, sources, casts and formats."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(shard.file.encode() + shard.header)
        for step in self.steps:
            digest.update(
                f"{step.path} {step.spec} {step.source} {step.format} {step.dequantize} {step.repacked} "
                f"{step.method} {step.guided}\n".encode()
            )
        if any(step.guided for step in self.steps):
            digest.update(f"{self.recipe.calibration}\n".encode())
            for text in self.recipe.calibration.texts:
                if (file := Path(text)).is_file():
                    digest.update(file.read_bytes())
        for file in self.source.weight_files:
            stat = file.stat()
            if self.source.revision is not None:
                # A commit names the bytes, wherever and whenever they are fetched.
                digest.update(f"{self.source.revision} {file.name} {stat.st_size}\n".encode())
                continue
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def make_plan(
    source: ModelSource,
    recipe: Recipe,
    architecture: Architecture,
    *,
    requantize: bool = False,
    dequantize: bool = False,
    keep_quantization: bool = False,
    allocated: Mapping[str, Format | None] | None = None,
    remarks: tuple[str, ...] = (),
) -> Plan:
    """Decide every module and lay out every byte.

    ``requantize`` reads modules that are stored quantized as numbers first; ``dequantize`` writes them so;
    ``keep_quantization`` carries GGUF blocks over exactly where an MLX format holds them. ``allocated`` is what a
    budget came to, by module path; a module it does not name stays unquantized.
    Raises RecipeError where a rule means nothing on this model, BadInputError where the source is already
    quantized by MLX and neither was asked for.
    """
    quantizes = recipe.default is not None or bool(recipe.rules) or recipe.budget is not None
    if source.config.get("quantization") is not None and quantizes and not requantize:
        raise BadInputError(
            f"{source.name} is already quantized for MLX",
            "Start from its original for the best result; --requantize dequantizes this one first, "
            "and mlxq convert --dequantize writes it as plain numbers.",
        )
    open_up = requantize or dequantize
    foreign = architecture.config.get("quantization_config")
    if foreign is not None and (quantizes or open_up):
        raise BadInputError(
            f"{source.name} is quantized as {foreign['quant_method']!r}, which only stays as it is",
            "mlxq convert carries it over; to quantize, start from the model it was made of.",
        )
    # Repacked blocks keep their F16 scales; a second float type beside them would make every sum a float32.
    dtype = recipe.dtype or ("float16" if keep_quantization else architecture.declared_dtype)
    dtypes = {p.spec.name: _written_dtype(p, dtype) for p in architecture.parameters}
    modules = tuple(m for m in architecture.modules if m.quantizable or m.stored)
    layers = architecture.layer_count
    paths = [module.path for module in modules]
    found, faults = assign(recipe.rules, paths, layers, architecture.tied_head)
    if faults:
        raise RecipeError(faults, "mlxq inspect MODEL --layers lists every module path.")
    decisions = {
        module.path: _decide(module, match, recipe, architecture, dtypes, allocated or {}, open_up=open_up)
        for module, match in zip(modules, found, strict=True)
    }
    if keep_quantization:
        decisions = {path: _repacked(d, source, architecture) for path, d in decisions.items()}
        if not any(d.format for d in decisions.values()):
            raise BadInputError(
                f"{source.name} has no blocks that an MLX format holds exactly",
                "Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 of GGUF files do; leave --keep-quantization out, or quantize.",
            )
    if recipe.strict and (unfit := [d for d in decisions.values() if d.misfit]):
        raise RecipeError(
            tuple(f"{d.path}: {d.note}" for d in unfit),
            "strict: true forbids this; give these modules a rule of their own.",
        )
    steps = _steps(architecture, recipe, decisions, dtypes, open_up=open_up, repack=keep_quantization)
    if source.weights_folder is None and (unmapped := [s.path for s in steps if s.source is None]):
        raise BadInputError(
            f"{source.name}: {unmapped[0]} cannot be read straight from a {source.kind} file",
            "Start from the model's safetensors instead.",
        )
    written = {spec.name: spec for step in steps for spec in step.outputs}
    final = tuple(
        replace(
            d,
            nbytes=sum(written[n].nbytes for part in _QUANTIZED_PARTS if (n := f"{d.path}.{part}") in written),
        )
        for d in decisions.values()
    )
    return Plan(
        source=source,
        recipe=recipe,
        architecture=architecture,
        decisions=final,
        steps=steps,
        shards=_shards(steps),
        config=_config(architecture, recipe, final),
        parameter_count=_parameter_count(architecture),
        remarks=remarks,
    )


def _written_dtype(parameter: Parameter, dtype: str | None) -> str:
    """The dtype a parameter is written in, as long as it is not quantized."""
    if dtype is None or not parameter.castable or parameter.spec.dtype not in FLOAT_DTYPES:
        return parameter.spec.dtype
    return DTYPE_BY_NAME[dtype]


def _decide(
    module: Module,
    match: Match,
    recipe: Recipe,
    architecture: Architecture,
    dtypes: Mapping[str, str],
    allocated: Mapping[str, Format | None],
    *,
    open_up: bool,
) -> Decision:
    """One module's decision: rule or default, then what the model asks for, then what its width allows."""
    rule = recipe.rules[match.rule] if match.rule is not None else None
    wanted = rule.format if rule else recipe.default
    by = rule.where if rule else "default"
    if rule is None and recipe.budget is not None:
        wanted, by = allocated.get(module.path), BY_BUDGET
    weight_dtype = dtypes[f"{module.path}.weight"]
    if module.stored:
        scales_dtype = dtypes[f"{module.path}.scales"]
        weight_dtype = scales_dtype if scales_dtype in FLOAT_DTYPES else "BF16"
    asked = None if module.asked is True else ("not quantized" if module.asked is False else str(module.asked))
    note = None
    tied = module.path == architecture.tied_head
    if rule and tied and any(p == "lm_head" for p in rule.patterns) and not _names_embedding(rule, module.path):
        note = "the head is tied to this embedding, so the rule for lm_head applies here"
    if module.stored and not open_up:
        wanted, by, note = module.stored, KEPT_AS_STORED, None
    elif wanted is not None and not (rule and _named_by(rule, module.path, architecture)):
        # What the model asks for is a floor; only a rule that names the module goes below it.
        if module.asked is False:
            wanted, by = None, "the model asks for it"
        elif isinstance(module.asked, Format) and wanted.bits <= module.asked.bits:
            wanted, by = module.asked, "the model asks for it"
    misfit = False
    if wanted is not None and wanted != module.stored:
        columns = module.shape[-1]
        fitting = fallback(columns, wanted)
        misfit = fitting != wanted
        if fitting is None:
            kept = FLOAT_DTYPES[weight_dtype]
            note = f"its width {columns} is no multiple of any group size of {wanted.mode}; kept in {kept}"
        elif fitting != wanted:
            note = f"its width {columns} is no multiple of {wanted.group_size}; group size {fitting.group_size} instead"
        wanted = fitting
    return Decision(
        path=module.path,
        shape=module.shape,
        dtype=weight_dtype,
        format=wanted,
        quantizable=module.quantizable or open_up,
        by=by,
        also=tuple(recipe.rules[i].where for i in match.also),
        asked=asked,
        note=note,
        misfit=misfit,
        method=method_for(
            "rtn" if wanted == module.stored else recipe.method,
            wanted,
            has_text=recipe.calibration.has_text,
            has_inputs=not _looks_up_only(module, architecture),
        ),
        nbytes=0,
    )


def _repacked(decision: Decision, source: ModelSource, architecture: Architecture) -> Decision:
    """The format that holds a module's GGUF blocks exactly; scales are F16, as the blocks have them."""
    parameter = next(p for p in architecture.parameters if p.spec.name == f"{decision.path}.weight")
    held = source.repack_format(parameter.source) if parameter.source else None
    if held is None or not decision.quantizable:
        return replace(decision, format=None, by="stored as numbers", method="rtn")
    return replace(decision, format=held, dtype="F16", by="same blocks as the source", method="rtn")


def _names_embedding(rule: Rule, path: str) -> bool:
    return any(matches(pattern, path) for pattern in rule.patterns)


def _named_by(rule: Rule, path: str, architecture: Architecture) -> bool:
    """Does a pattern that names modules (rather than sweeps over them) match ``path``?"""
    aliases = (path, "lm_head") if path == architecture.tied_head else (path,)
    return any(names_module(p) and any(matches(p, alias) for alias in aliases) for p in rule.patterns)


def _steps(
    architecture: Architecture,
    recipe: Recipe,
    decisions: Mapping[str, Decision],
    dtypes: Mapping[str, str],
    *,
    open_up: bool,
    repack: bool,
) -> tuple[Step, ...]:
    stored = {m.path for m in architecture.modules if m.stored}
    lookups = {m.path for m in architecture.modules if _looks_up_only(m, architecture)}
    steps = []
    for parameter in architecture.parameters:
        name = parameter.spec.name
        module, _, part = name.rpartition(".")
        decision = decisions.get(module)
        if module in stored and open_up and part in _QUANTIZED_PARTS:
            if part != "weight":
                continue
            assert decision is not None
            spec = TensorSpec(name, decision.dtype, decision.shape)
            outputs = layout(spec, decision.format) if decision.format else (spec,)
            steps.append(Step(name, spec, None, decision.format, True, False, outputs, decision.method))
            continue
        numbers = decision if part == "weight" and module not in stored else None
        spec = replace(parameter.spec, dtype=numbers.dtype if numbers else dtypes[name])
        encode = numbers.format if numbers else None
        outputs = layout(spec, encode) if encode else (spec,)
        method = numbers.method if numbers else "rtn"
        guided = method != "rtn" and recipe.calibration.has_text and module not in lookups
        repacked = repack and encode is not None
        steps.append(Step(name, spec, parameter.source, encode, False, repacked, outputs, method, guided))
    return tuple(steps)


def _looks_up_only(module: Module, architecture: Architecture) -> bool:
    """Whether ``module`` multiplies nothing, so that calibration has no inputs of it to describe."""
    return "Embedding" in module.kind and module.path != architecture.tied_head


def _shards(steps: tuple[Step, ...]) -> tuple[Shard, ...]:
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for step in steps:
        nbytes = sum(spec.nbytes for spec in step.outputs)
        if groups[-1] and filled + nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].extend(step.outputs)
        filled += nbytes
    shards = []
    for number, specs in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Widest dtype first keeps every tensor aligned to its own item size for readers that map the file.
        ordered = sorted(specs, key=lambda spec: -(spec.nbytes // max(spec.size, 1)))
        header = encode_header(ordered, {"format": "mlx"})
        offsets, offset = {}, len(header)
        for spec in ordered:
            offsets[spec.name] = offset
            offset += spec.nbytes
        shards.append(Shard(name, header, offsets, offset))
    return tuple(shards)


def _config(architecture: Architecture, recipe: Recipe, decisions: tuple[Decision, ...]) -> dict[str, Any]:
    """``config.json`` as written: every deviation from the top-level format in full, ``false`` for what is kept."""
    config = dict(architecture.config)
    if recipe.dtype:
        for key in ("torch_dtype", "dtype"):
            if key in config:
                config[key] = recipe.dtype
    formats = Counter(d.format for d in decisions if d.format)
    if not formats:
        return config
    default = recipe.default if recipe.default in formats else formats.most_common(1)[0][0]
    assert default is not None
    kept = {d.path: d.format for d in decisions if d.by == KEPT_AS_STORED and d.format}
    quantization: dict[str, Any] = dict(default.as_config())
    for decision in decisions:
        if decision.format is None:
            quantization[decision.path] = False
        elif decision.format != default:
            quantization[decision.path] = decision.format.as_config()
    for parameter in architecture.parameters:
        module, _, part = parameter.spec.name.rpartition(".")
        if part == "global_scale" and module in kept:
            quantization[module] = {**kept[module].as_config(), "global_scale": True}
    config["quantization"] = quantization
    config["quantization_config"] = quantization
    return dict(sorted(config.items()))


def _parameter_count(architecture: Architecture) -> int:
    """Logical parameters: a quantized weight counts its numbers, not its words, and its scales not at all."""
    stored = {m.path: m for m in architecture.modules if m.stored}
    ternary = {m.path for m in architecture.modules if m.kind == "BitLinear"}
    count = 0
    for parameter in architecture.parameters:
        module, _, part = parameter.spec.name.rpartition(".")
        if module in stored and part in _QUANTIZED_PARTS:
            count += math.prod(stored[module].shape) if part == "weight" else 0
        elif module in ternary:
            count += parameter.spec.size * TERNARY_PER_BYTE if part == "weight" else 0
        else:
            count += parameter.spec.size
    return count


def config_text(config: Mapping[str, Any]) -> str:
    """``config.json`` as text, non-finite floats tagged the way ``transformers`` and ``mlx_lm`` expect."""
    return json.dumps(_tagged(config), indent=4) + "\n"


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return {"__float__": "NaN"}
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {key: _tagged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(inner) for inner in value]
    return value
