"""How text is cut before byte-level BPE, by the names that GGUF files have for it (``tokenizer.ggml.pre``).

References: llama.cpp ``src/llama-vocab.cpp`` for what each name means at run time, and the ``tokenizer.json`` of the
models for how it is spelled in ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxq.errors import BadInputError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINE_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CJK = "[一-龥ࠀ-一가-퟿]+"

_LLAMA3_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINE_ENDS}"
_QWEN2_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SYMBOLS}|{_LINE_ENDS}"
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINE_ENDS}"
)
_DEEPSEEK_LLM_SPLITS = (
    r"[\r\n]",
    # The model's own file lists every cased letter by code point.
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+",
    r"\s+$",
    _CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER_SPLITS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before byte-level BPE.

    ``splits`` are applied one after another; none means GPT-2's own rule, after ``digits`` one by one.
    ``nfc`` normalizes first; ``whole_words`` looks a whole piece up before merging (``ignore_merges``);
    ``adds_bos`` says whether the model expects a start token where the file does not say.
    """

    splits: tuple[str, ...] = ()
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer((_LLAMA3_SPLIT,), whole_words=True, adds_bos=True)
_QWEN2 = PreTokenizer((_QWEN2_SPLIT,), nfc=True)

# ``tokenizer.ggml.pre`` -> rule; names that mean the same share one.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _GPT2,
    "mpt": _GPT2,
    "olmo": _GPT2,
    "jais": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "dbrx": PreTokenizer((_LLAMA3_SPLIT,)),
    "smaug-bpe": PreTokenizer((_LLAMA3_SPLIT,)),
    "tekken": PreTokenizer((_TEKKEN_SPLIT,), whole_words=True, adds_bos=True),
    "qwen2": _QWEN2,
    "megrez": _QWEN2,
    "kormo": _QWEN2,
    "deepseek-r1-qwen": PreTokenizer((_QWEN2_SPLIT,)),
    "deepseek-llm": PreTokenizer(_DEEPSEEK_LLM_SPLITS),
    "deepseek-coder": PreTokenizer(_DEEPSEEK_CODER_SPLITS),
}


def pre_tokenizer(metadata: Mapping[str, Any], where: str) -> PreTokenizer:
    """The rule that ``tokenizer.ggml.pre`` names. Raises BadInputError where it names none that is known.

    No name, or "default", is no rule of any model: files of before May 2024 and some converters have it. llama.cpp
    then cuts text by a rule of its own making, and warns of degraded quality.
    """
    name = metadata.get("tokenizer.ggml.pre") or "default"
    if name == "default":
        raise BadInputError(
            f"{where} does not say how its model cuts text (tokenizer.ggml.pre is missing, or 'default')",
            "Say it in a copy, with the gguf package: gguf-new-metadata --pre-tokenizer NAME OLD.gguf NEW.gguf, where "
            "NAME is llama-bpe for Llama 3, qwen2 for Qwen 1.5 to 3; or quantize the original model from the Hub.",
        )
    if name not in PRE_TOKENIZERS:
        raise BadInputError(
            f"{where} cuts text by pre-tokenizer {name!r}, which is not known here",
            f"Known: {', '.join(PRE_TOKENIZERS)}. Quantize the original model from the Hub instead.",
        )
    return PRE_TOKENIZERS[name]
