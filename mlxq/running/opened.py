"""A stored model, opened and asked as ``mlx_lm`` does it.

Meant for a process of its own (``mlxq.machine.child``). What a folder's files raise becomes one line that says of
what, and no code of theirs runs unless the person trusted it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq import upstream
from mlxq.architecture.opening import open_lazily
from mlxq.architecture.token_ids import check_ids, rows_of_model
from mlxq.architecture.tokenizer import open_tokenizer
from mlxq.errors import MlxqError
from mlxq.machine.child import Limits

# Far more than any template takes to lay out one question, on any machine.
_TEMPLATE_S = 20.0


@dataclass(frozen=True)
class Opened:
    """A model with its weights unread, and its tokenizer. ``rows``: of its largest embedding; ids lie below."""

    model: Any
    tokenizer: Any
    rows: int | None


@dataclass(frozen=True)
class Spoken:
    """A greedy answer, and the tokens/s of its prompt and of its generation."""

    text: str
    prompt_tps: float
    generation_tps: float


def child_limits(folder: Path, seconds: float) -> Limits:
    """Limits for running the model in ``folder``.

    The memory is three times its weights (16-bit weights as they are and cast to fp32) and 4 GB for Python, the
    libraries and the cache: no honest model comes near, and no other gets much further.
    """
    return Limits(seconds, 3 * sum(file.stat().st_size for file in folder.glob("model*.safetensors")) + 4_000_000_000)


def without_paths(text: str, folder: Path) -> str:
    """``text`` without where on this machine ``folder`` lies, for what may be published."""
    for path in (folder.resolve(), folder.absolute()):
        text = text.replace(f"{path}/", "").replace(str(path), folder.name)
    return text.replace(str(Path.home()), "~")


def open_folder(folder: Path, *, trusted: bool = False) -> Opened:
    """Open a model folder, every weight unevaluated. Its own code is run only where it is ``trusted``.

    Raises BadInputError where ``mlx_lm`` cannot open the model or its tokenizer.
    """
    model, config = open_lazily(folder, folder.name, trusted=trusted)
    tokenizer = open_tokenizer(folder, "its", trusted=trusted, eos_token_ids=config.get("eos_token_id"))
    return Opened(model, tokenizer, rows_of_model(model))


def prompt_tokens(
    opened: Opened, prompt: str | Sequence[Mapping[str, str]], *, seconds: float = _TEMPLATE_S
) -> list[int]:
    """Token ids of a prompt or of chat messages, in the chat template where the tokenizer has one.

    Raises MlxqError where the template fails, takes over ``seconds``, or makes ids that the embedding does not have.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    tokenizer = opened.tokenizer
    templated = tokenizer.chat_template is not None
    what = "its chat template" if templated else "its tokenizer"
    with _time_limit(seconds, what):
        try:
            if templated:
                tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            else:
                tokens = tokenizer.encode(messages[-1]["content"])
        except MlxqError:
            raise
        except Exception as exc:  # A template is a program; whatever it raises, it failed.
            raise MlxqError(f"{what} fails: {type(exc).__name__}: {exc}") from exc
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise MlxqError(f"{what} gives no list of token ids")
    if not tokens:
        raise MlxqError(f"{what} makes no tokens of the prompt")
    check_ids(tokens, opened.rows, what)
    return tokens


@contextlib.contextmanager
def _time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise MlxqError inside the context after ``seconds`` of wall clock. For the main thread."""

    def give_up(signum: int, frame: object) -> None:
        raise MlxqError(f"{what} took over {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def speak(opened: Opened, tokens: list[int], max_tokens: int) -> Spoken:
    """Answer greedily, with at most ``max_tokens``. Raises MlxqError where the model computes NaN."""
    import mlx.core as mx

    text, last = "", None
    for last in upstream.stream_generate(opened.model, opened.tokenizer, tokens, max_tokens):
        # The most likely of NaN is token 0: an answer, and no sense.
        if mx.isnan(last.logprobs).any().item():
            raise MlxqError("the model computes NaN")
        text += last.text
    if last is None:
        return Spoken("", 0.0, 0.0)
    return Spoken(text.strip(), last.prompt_tps, last.generation_tps)
