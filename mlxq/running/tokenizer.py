"""A folder's tokenizer and chat template, tried in a process of its own: none of its code, and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.architecture.token_ids import sorted_out
from mlxq.architecture.tokenizer import open_tokenizer
from mlxq.machine.child import Limits, run_child
from mlxq.running.opened import Opened, prompt_tokens

# The libraries that a tokenizer needs take seconds to load, the largest vocabularies a few more.
_LIMITS = Limits(120.0, 6_000_000_000)
_QUESTION = "Why is the sky blue?"


@dataclass(frozen=True)
class TokenizerTried:
    """What opening a tokenizer showed.

    ``template`` says whether it has a chat template, and ``template_fault`` what that one does wrong. ``unreachable``
    tells of special tokens whose ids the embedding has no row for, ``misfit`` of such tokens that text can come to.
    """

    tokens: int
    template: bool
    template_fault: str | None
    unreachable: str | None
    misfit: str | None


def try_tokenizer(folder: Path, rows: int | None, *, trusted: bool = False) -> TokenizerTried:
    """Open the tokenizer of ``folder`` and lay out a question; its own code runs only where it is ``trusted``.

    ``rows`` are those of the model's embedding. Raises ChildError where it does not open, or passes a limit.
    """
    request = {"folder": str(folder), "rows": rows, "trusted": trusted}
    return TokenizerTried(**run_child(answer_tokenizer, request, _LIMITS))


def answer_tokenizer(request: dict[str, Any]) -> dict[str, Any]:
    """The child's part of ``try_tokenizer``."""
    from mlxq.errors import MlxqError

    tokenizer = open_tokenizer(Path(request["folder"]), "its", trusted=request["trusted"])
    vocabulary = dict(tokenizer.get_vocab())
    added = tokenizer.added_tokens_decoder.values()
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    past = sorted_out(vocabulary, special, request["rows"])
    fault = None
    try:
        prompt_tokens(Opened(None, tokenizer, request["rows"]), _QUESTION)
    except MlxqError as error:
        fault = error.message
    return {
        "tokens": len(vocabulary),
        "template": tokenizer.chat_template is not None,
        "template_fault": fault,
        "unreachable": str(past) if past and not past.ordinary else None,
        "misfit": str(past) if past and past.ordinary else None,
    }
