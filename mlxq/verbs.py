"""The verbs as functions: what each command does, without a word printed. The commands are built on these.

A model is what the commands take: a folder, a ``.gguf`` file, ``org/name[@revision]``, or ``sample``. A recipe is the
name of a shipped one, a file, a dict of what such a file holds, or a ``Recipe``. ``on_event`` is called with frozen
dataclasses that say how far it is (``Event``), from several threads while files are fetched; what it raises ends the
run, which the same call continues. Every error is an MlxqError with ``message`` and ``hint``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxq import api
from mlxq.api import ignore
from mlxq.errors import BadInputError
from mlxq.machine.backend import start_mlx
from mlxq.recipe.gates import parse_gate
from mlxq.recipe.target import Target

if TYPE_CHECKING:
    from mlxq.api import Inspected, OnEvent
    from mlxq.comparison.result import Comparison
    from mlxq.pipeline import Finished
    from mlxq.planning.plan import Plan
    from mlxq.publish.publish import Published
    from mlxq.recipe.model import Recipe


def inspect(
    model: str | Path,
    *,
    context: int = 4096,
    device: str | None = None,
    text: str | None = None,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Inspected:
    """What is in a model and where it fits, from headers alone; needs neither MLX nor its weights.

    ``context`` is in tokens, ``device`` a name such as ``m4-max-64gb``; by default this machine.
    ``text`` is encoded by the model's tokenizer, and decoded again.
    Raises BadInputError where there is no such model or device, or its tokenizer does not open.
    """
    wanted = text is not None
    source = api.find_model(model, trusted=trust_remote_code, tokenizer=wanted, on_event=on_event)
    return api.inspected(source, context, device, text)


def plan(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    requantize: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Plan:
    """Every decision and every byte that ``quantize`` would write, to the byte. Weights are read only by a budget.

    ``requantize`` reads a model that is quantized already as numbers.
    Raises RecipeError with every fault of the recipe on this model, BadInputError where it cannot be made.
    """
    from mlxq.planning.plan import Stored

    loaded = api.as_recipe(recipe)
    start_mlx()
    source = api.find_model(model, trusted=trust_remote_code, on_event=on_event)
    return api.planned(loaded, source, Stored.REQUANTIZE if requantize else Stored.AS_IS, on_event=on_event)


def quantize(
    model: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    output: str | Path | None = None,
    requantize: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Finished:
    """Make the model that ``recipe`` describes, verified, in ``output`` (by default ``./MODEL-RECIPE``).

    ``force`` replaces a model that is there. The recipe's gates are checked after; its ``upload`` is left to
    ``upload``.
    Raises BadInputError where it cannot be made as asked, MlxqError where the run fails (the same call continues it),
    GateError where the model was made and does not meet a gate.
    """
    loaded = api.as_recipe(recipe)
    out = api.output_folder(output, loaded, model, free=not force)
    made = plan(model, loaded, requantize=requantize, trust_remote_code=trust_remote_code, on_event=on_event)
    finished = api.write(made, out, force=force, on_event=on_event)
    api.require_gates(api.check_recipe_gates(made, out, on_event=on_event), out)
    return finished


def convert(
    model: str | Path,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    keep_quantization: bool = False,
    force: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Finished:
    """Write a model for MLX without quantizing it, in ``dtype`` (``bfloat16``, ``float16``, ``float32``) or its own.

    ``dequantize`` writes what is quantized as plain numbers; ``keep_quantization`` carries the blocks of a GGUF file
    over bit for bit where MLX has the same format.
    Raises BadInputError where it cannot be made as asked, MlxqError where the run fails (the same call continues it).
    """
    stored = api.stored_for_convert(dequantize=dequantize, keep_quantization=keep_quantization)
    recipe = api.convert_recipe(dtype)
    start_mlx()
    out = api.output_folder(output, recipe, model, free=not force)
    source = api.find_model(model, trusted=trust_remote_code, on_event=on_event)
    return api.write(api.planned(recipe, source, stored, on_event=on_event), out, force=force, on_event=on_event)


def compare(
    reference: str | Path,
    *candidates: str | Path | Mapping[str, Any] | Recipe,
    texts: str | Path | Sequence[str | Path] = (),
    tokens: int | None = None,
    prompts: str | Sequence[str | Sequence[Mapping[str, str]]] = (),
    speed: bool = True,
    gates: str | Sequence[str] = (),
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Comparison:
    """What each candidate, a model or a recipe applied to ``reference``, costs and how far it is from it.

    Measured on ``texts``, files or ``"self"`` (by default the shipped corpus), over at most ``tokens`` tokens.
    ``speed`` times every stored model in a process of its own, where it also answers ``prompts``: texts, or lists of
    chat messages. ``gates``, such as ``kl_mean<0.05``, must hold for every candidate. After each model ``on_event`` is
    told the Comparison so far, so that a gate that fails loses nothing.
    Raises BadInputError for models that do not compare, GateError where a gate fails.
    """
    if not candidates:
        raise BadInputError("nothing to compare with the original", "Name models or recipes after it.")
    if prompts and not speed:
        raise BadInputError("prompts are answered where speed is measured", "Leave out speed=False, or the prompts.")
    parsed = [parse_gate(gate) for gate in _several(gates)]
    start_mlx()
    from mlxq.comparison.measure import Settings
    from mlxq.running.speed import usual_settings

    settings = Settings(
        texts=tuple(map(str, _several(texts))),
        tokens=tokens,
        speed=usual_settings() if speed else None,
        prompts=tuple(
            each if isinstance(each, str) else [dict(message) for message in each] for each in _several(prompts)
        ),
    )
    done = api.compared(reference, candidates, settings, trusted=trust_remote_code, on_event=on_event)
    api.require_gates(api.gate_results(parsed, done))
    return done


def _several(given: Any) -> Sequence[Any]:
    """What was given, and one text or path as a list of it: it would else be read letter by letter."""
    return [given] if isinstance(given, str | Path) else given


def upload(
    folder: str | Path,
    target: str | Target,
    *,
    force: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Published:
    """Publish a folder that mlxq wrote on the Hub, as ``org/name``, or as a Target that also says how.

    ``force`` publishes even what does not match its ``mlxq.json`` or does not load.
    Raises BadInputError where the folder is not whole or the Hub refuses, MlxqError where it cannot be reached.
    """
    from mlxq.publish.hub import no_progress_bars

    start_mlx()
    where = target if isinstance(target, Target) else Target(target)
    with no_progress_bars():
        return api.published(Path(folder), where, force=force, trusted=trust_remote_code, on_event=on_event)
