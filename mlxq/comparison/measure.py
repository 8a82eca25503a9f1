"""Compare models with a reference: size, speed, memory, and how far each is from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlxq.architecture.config import context_length
from mlxq.architecture.opening import open_lazily
from mlxq.architecture.token_ids import check_ids, rows_of_model
from mlxq.architecture.tokenizer import source_tokenizer
from mlxq.calibration.text import (
    SELF,
    WINDOW_TOKENS,
    TextInfo,
    TokenizedText,
    Windows,
    corpus_text,
    read_texts,
    sample_from,
    sampling_start,
    tokenize,
)
from mlxq.comparison.pairing import check_predictable, logit_count, padded_note, reads
from mlxq.comparison.result import Comparison, ModelResult
from mlxq.errors import BadInputError, ChildError
from mlxq.headers import parse_json
from mlxq.machine.cores import batch_size, on_cpu
from mlxq.metrics.evaluation import evaluation_model
from mlxq.metrics.faithfulness import Faithfulness, measure_faithfulness
from mlxq.metrics.reference import Reference, build_reference
from mlxq.metrics.size import Size, measure_size
from mlxq.recipe.match import layer_index
from mlxq.running.opened import without_paths
from mlxq.running.speed import Speed, SpeedSettings, measure_speed
from mlxq.writing.report import FILE_NAME, read_report

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from mlxq.sources.base import ModelSource

# The noise floor needs no long text: it is a yardstick, read to one digit.
_FLOOR_TOKENS = 4096
_PROBE = "mlxq: a Tokenizer's check, 12345 + x_1 = \u00e9\u4f60\u597d \U0001f600\n\tdef f(): return None"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Candidate:
    """A model to measure. ``load`` gives it as an mlx-lm model, its weights unevaluated.

    ``source`` is what is stored, in a folder that ``mlx_lm`` can open, or None for a model that exists only in memory
    (a recipe applied to the reference): it then has no speed. ``size`` is counted from the files, or planned.
    ``layer_bits`` maps each layer's label to its bits per weight. ``load_tokenizer`` is None where it is the
    reference's own. ``budget`` is what its ``mlxq.json`` says of how a budget was spent.
    """

    name: str
    load: Callable[[], nn.Module]
    load_tokenizer: Callable[[], Any] | None
    size: Size
    layer_bits: Mapping[str, float]
    source: ModelSource | None
    budget: Mapping[str, Any] | None = None

    @property
    def folder(self) -> Path | None:
        """Where it is stored, if it is."""
        return None if self.source is None else self.source.weights_folder


@dataclass(frozen=True)
class Measuring:
    """``done`` of ``total`` (tokens, or models timed) of ``stage`` for ``model``; ``eta_s`` None at first."""

    stage: str
    model: str
    done: int
    total: int
    tokens_per_s: float | None
    eta_s: float | None


@dataclass(frozen=True)
class Settings:
    """What to compare on. ``texts``: files, or the word ``self``; none means the shipped corpus.

    ``tokens`` is the most tokens scored, in sequences cut as ``windows`` says. ``speed`` None leaves timing
    out. ``answer_tokens`` is the longest answer to one of ``prompts``.
    """

    texts: tuple[str, ...] = ()
    tokens: int | None = None
    windows: Windows = field(default_factory=Windows)
    speed: SpeedSettings | None = field(default_factory=SpeedSettings)
    prompts: tuple[Any, ...] = ()
    answer_tokens: int = 128


def stored_candidate(name: str, source: ModelSource) -> Candidate:
    """A model stored in a folder that mlx-lm can open.

    Raises BadInputError where the folder is not a causal language model.
    """
    folder = source.weights_folder
    assert folder is not None, "what mlx_lm cannot open is converted first"
    return Candidate(
        name=name,
        load=lambda: open_lazily(folder, name, trusted=source.trusted)[0],
        load_tokenizer=lambda: source_tokenizer(source, f"{name}'s"),
        size=measure_size(folder),
        layer_bits=stored_layer_bits(folder),
        source=source,
        budget=_recorded_budget(folder),
    )


def _recorded_budget(folder: Path) -> Mapping[str, Any] | None:
    """How a budget was spent on the model, where mlxq wrote it and had one."""
    file = folder / FILE_NAME
    budget: Mapping[str, Any] | None = read_report(file).get("budget") if file.exists() else None
    return budget


def stored_layer_bits(folder: Path) -> dict[str, float]:
    """Bits per weight of each decoder layer, and of what lies outside them, counted from the files."""
    from mlxq.headers import read_file_header

    bits: dict[str, float] = {}
    weights: dict[str, float] = {}
    module_bits = measure_size(folder).module_bits
    for file in sorted(folder.glob("model*.safetensors")):
        for tensor in read_file_header(file):
            module, _, part = tensor.spec.name.rpartition(".")
            index = layer_index(module)
            label = str(index) if index is not None else module.rpartition(".")[2]
            packed = module in module_bits
            count = tensor.spec.size * 32 / module_bits[module] if packed else tensor.spec.size
            bits[label] = bits.get(label, 0) + tensor.spec.nbytes * 8
            # Scales and biases cost bits and hold no weights.
            weights[label] = weights.get(label, 0) + (count if not packed or part == "weight" else 0)
    order = sorted(bits, key=lambda label: (not label.startswith("embed"), not label.isdigit(), _number(label)))
    return {label: bits[label] / weights[label] for label in order if weights[label] > 1e4 or label.isdigit()}


def _number(label: str) -> int:
    return int(label) if label.isdigit() else 0


def read_prompts(file: Path) -> tuple[Any, ...]:
    """Prompts of a file, one per line; a line that is JSON is chat messages: a list, or ``{"messages":
    [...]}``.
    """
    prompts: list[Any] = []
    for number, line in enumerate(read_texts([file]).splitlines(), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith(("[", "{")):
            prompts.append(line)
            continue
        try:
            found = parse_json(line.encode(), str(file))
            messages = found["messages"] if isinstance(found, dict) else found
            prompts.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
        except (BadInputError, KeyError, TypeError) as exc:
            raise BadInputError(
                f"{file}:{number}: not chat messages",
                'Write a prompt, or JSON such as [{"role": "user", "content": "..."}].',
            ) from exc
    return tuple(prompts)


def compare(
    reference: Candidate, candidates: Sequence[Candidate], settings: Settings
) -> Iterator[Measuring | Comparison]:
    """Measure every model, the reference first. Yields progress, and a Comparison after each finished model.

    The last Comparison holds everything; whoever is interrupted keeps the one before. Of weights, at most one
    model and the reference's head are in memory at a time (see ``build_reference``). Raises BadInputError for
    tokenizers that differ and for a text that is empty or too short.
    """
    tokenizer = _required_tokenizer(reference)
    _check_tokenizers(reference, tokenizer, candidates)
    _check_context(reference, settings)
    speed, not_timed = yield from _timed(reference, settings)
    model = evaluation_model(reference.load())
    yield Measuring("text", reference.name, 0, 1, None, None)
    text = _text(model, tokenizer, settings)
    check_ids(text.ids, rows_of_model(model), f"{reference.name}'s tokenizer")
    width = logit_count(model)
    batches = _batches(text, width)
    total = sum(tokens.size for tokens, _ in batches)
    held = yield from _watched(
        build_reference(model, [tokens for tokens, _ in batches]),
        "reference",
        reference.name,
        total,
    )
    del model
    floor = yield from _noise_floor(held, reference, batches)
    results = [
        ModelResult(reference.name, reference.size, reference.layer_bits, None, speed, tied=False, not_timed=not_timed)
    ]
    done = Comparison(tuple(results), text.info, floor, _notes(held, batches, text.info, settings), not candidates)
    yield done
    for candidate in candidates:
        speed, not_timed = yield from _timed(candidate, settings)
        model = reads(text, candidate.load(), candidate.name)
        their_width = logit_count(model)
        check_predictable(text, min(width, their_width), candidate.name)
        found = yield from _watched(measure_faithfulness(held, model, batches), "faithfulness", candidate.name, total)
        del model
        if results[0].reference_ppl is None or their_width >= width:
            results[0] = replace(results[0], reference_ppl=found.ppl_ref)
        results.append(
            ModelResult(
                candidate.name,
                candidate.size,
                candidate.layer_bits,
                found,
                speed,
                tied=is_tied(found, floor),
                not_timed=not_timed,
                budget=candidate.budget,
            )
        )
        if their_width != width:
            done = replace(done, notes=(*done.notes, padded_note(candidate.name, their_width, width)))
        done = replace(done, results=tuple(results), complete=len(results) == len(candidates) + 1)
        yield done


def _noise_floor(
    held: Reference, reference: Candidate, batches: Sequence[tuple[mx.array, mx.array]]
) -> Generator[Measuring, None, Faithfulness]:
    """The reference in its own dtype against itself in fp32, on the first of ``batches``."""
    few = batches[: max(1, _FLOOR_TOKENS // batches[0][0].size)]
    steps = measure_faithfulness(held, evaluation_model(reference.load(), own_dtype=True), few)
    return (yield from _watched(steps, "noise floor", reference.name, sum(tokens.size for tokens, _ in few)))


def is_tied(found: Faithfulness, floor: Faithfulness) -> bool:
    """Whether a model is inside the noise floor: no further off than its mean KL and two standard errors of it."""
    return found.kl_mean <= floor.kl_mean + 2 * floor.kl_mean_se


def _timed(candidate: Candidate, settings: Settings) -> Generator[Measuring, None, tuple[Speed | None, str | None]]:
    """The speed of a model, or why it could not be measured; neither where none was asked for."""
    source = candidate.source
    if source is None or source.weights_folder is None or settings.speed is None:
        return None, None
    yield Measuring("speed", candidate.name, 0, 1, None, None)
    try:
        speed = measure_speed(
            source.weights_folder,
            settings.speed,
            settings.prompts,
            answer_tokens=settings.answer_tokens,
            trusted=source.trusted,
        )
    except ChildError as error:
        return None, without_paths(error.message, source.weights_folder)
    yield Measuring("speed", candidate.name, 1, 1, None, 0.0)
    return speed, None


def _watched(steps: Generator[int, None, _T], stage: str, model: str, total: int) -> Generator[Measuring, None, _T]:
    """Turn the token counts of ``steps`` into progress with rate and time left; return what they return."""
    began, done = time.perf_counter(), 0
    yield Measuring(stage, model, 0, total, None, None)
    while True:
        try:
            done += next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        rate = done / (time.perf_counter() - began)
        yield Measuring(stage, model, done, total, rate, max(0, total - done) / rate)


def _required_tokenizer(reference: Candidate) -> Any:
    if reference.load_tokenizer is None:
        raise BadInputError(f"{reference.name} cannot be the reference: it is a recipe", "Name a model.")
    return reference.load_tokenizer()


def _check_tokenizers(reference: Candidate, tokenizer: Any, candidates: Sequence[Candidate]) -> None:
    """Numbers per token mean nothing between models that cut text differently."""
    vocabulary, ids = tokenizer.get_vocab(), tokenizer.encode(_PROBE)
    for candidate in candidates:
        if candidate.load_tokenizer is None:
            continue
        other = candidate.load_tokenizer()
        if other.get_vocab() != vocabulary or other.encode(_PROBE) != ids:
            raise BadInputError(
                f"{candidate.name} and {reference.name} have different tokenizers: numbers do not compare",
                "Compare models of one family; --reference names the original.",
            )


def _check_context(reference: Candidate, settings: Settings) -> None:
    """Past the context that a model was made for its numbers mean little, and a table of positions has no row."""
    context = context_length(reference.source.config) if reference.source else None
    window = settings.windows.sequence_tokens
    # The usual window is shorter than the context of any model in use.
    if context and context < window > WINDOW_TOKENS:
        raise BadInputError(
            f"a window of {window:,} tokens is longer than {reference.name}'s context, {context:,}",
            "Give a shorter one with --window.",
        )


def _text(model: nn.Module, tokenizer: Any, settings: Settings) -> TokenizedText:
    texts, windows = settings.texts, settings.windows
    if texts == (SELF,):
        return sample_from(model, windows, sampling_start(tokenizer), tokens=settings.tokens or 8192)
    if SELF in texts:
        raise BadInputError("--text self does not mix with files", "Run compare once for each.")
    if not texts:
        return tokenize(corpus_text(), "shipped corpus (evaluation)", tokenizer, windows, limit=settings.tokens)
    files = [Path(text) for text in texts]
    name = ", ".join(file.name for file in files)
    return tokenize(read_texts(files), name, tokenizer, windows, limit=settings.tokens)


def _batches(text: TokenizedText, vocabulary: int) -> list[tuple[mx.array, mx.array]]:
    import mlx.core as mx

    from mlxq.machine.runtime import free_memory_bytes

    size = batch_size(text.info.sequence_tokens, vocabulary, free_memory_bytes())
    rows = [mx.array(text.ids[i : i + size]) for i in range(0, len(text.ids), size)]
    return [(ids[:, :-1], ids[:, -text.info.scored_tokens :]) for ids in rows]


def _notes(
    held: Reference, batches: Sequence[tuple[mx.array, mx.array]], text: TextInfo, settings: Settings
) -> tuple[str, ...]:
    count = batches[0][0].shape[0]
    notes = [
        text.windows_in_words(),
        "Faithfulness: fp32 on dequantized weights, on a CPU."
        if on_cpu()
        else "Faithfulness: quantized kernels with fp32 activations, on the GPU.",
        f"Run in batches of {count} sequences.",
    ]
    if not held.is_split:
        notes.append("The reference stayed in memory whole: its head could not be told from its body.")
    if settings.speed is not None and on_cpu():
        notes.append("Speed and memory are a CPU's; on a Mac's GPU they differ.")
    if settings.speed is None:
        notes.append("Speed was not measured.")
    return tuple(notes)
