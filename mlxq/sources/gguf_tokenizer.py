"""The tokenizer, chat template and generation settings that a GGUF file carries, as Hugging Face files.

GGUF keeps the vocabulary, merges (or SentencePiece scores), token types and the *name* of the pre-tokenizer.
The rest of ``tokenizer.json`` is put back from that name. References: llama.cpp ``src/llama-vocab.cpp`` for what
each name means at run time, and ``transformers.integrations.gguf`` for how it is spelled in ``tokenizers``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlxq.errors import BadInputError
from mlxq.sources.belongings import TEMPLATES
from mlxq.sources.gguf_pre_tokenizers import pre_tokenizer

# ``gguf.TokenType``: what a vocabulary entry is.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# ``tokenizer.chat_template.tool_use`` and the like.
_NAMED_TEMPLATE = "tokenizer.chat_template."

# Turn-ending tokens that instruct models name in their template; many files give only one end token.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>")


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end generation: the file's own, and turn-ending control tokens its chat template uses."""
    declared = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    ids = [token for token in declared if token is not None]
    templates = chat_templates(metadata).values()
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    spoken = [end for end in _TURN_ENDS if any(end in template for template in templates)]
    if spoken:
        places = {token: index for index, token in enumerate(tokens) if token in spoken}
        ids += [places[end] for end in spoken if end in places]
    return tuple(dict.fromkeys(ids))


def check_tokenizer(metadata: Mapping[str, Any], where: str) -> None:
    """Raise BadInputError unless ``tokenizer_files`` can rebuild this file's tokenizer. Cheap."""
    hint = "Quantize the original model from the Hub instead; it brings its own tokenizer."
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise BadInputError(f"{where} has no tokenizer", hint)
    if kind == "llama":
        if len(metadata.get("tokenizer.ggml.scores", ())) != len(tokens):
            raise BadInputError(f"{where} has a SentencePiece tokenizer without a score for each token", hint)
    elif kind == "gpt2":
        if not metadata.get("tokenizer.ggml.merges"):
            raise BadInputError(f"{where} has a byte-level BPE tokenizer without merges", hint)
        pre_tokenizer(metadata, where)
    else:
        raise BadInputError(f"{where} has a tokenizer of kind {kind!r}; 'gpt2' and 'llama' are supported", hint)
    _check_templates(metadata, where, hint)
    types = metadata.get("tokenizer.ggml.token_type")
    if types is not None and len(types) != len(tokens):
        raise BadInputError(f"{where} has {len(tokens):,} tokens and {len(types):,} token types", hint)
    for role in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise BadInputError(f"{where} has {role} token id {token_id}, and only {len(tokens):,} tokens", hint)


def check_rows(metadata: Mapping[str, Any], rows: int, where: str) -> None:
    """Raise BadInputError where the tokenizer has a token that the embedding of ``rows`` rows has no row for.

    Fewer tokens than rows are usual: embeddings are padded.
    """
    vocabulary = _vocabulary(metadata["tokenizer.ggml.tokens"], _token_types(metadata))
    token, last = max(vocabulary.items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise BadInputError(
            f"{where} has {last + 1:,} tokens, the last {token!r}, and an embedding of {rows:,} rows",
            "Its tokens or its weights are of another model: quantize the original model from the Hub.",
        )


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by the file that transformers reads each from: the default one, and those that have a name."""
    named = (
        (key.removeprefix(_NAMED_TEMPLATE), text) for key, text in metadata.items() if key.startswith(_NAMED_TEMPLATE)
    )
    default = metadata.get("tokenizer.chat_template")
    found = {"chat_template.jinja": default} if default else {}
    return found | {f"{TEMPLATES}/{name}.jinja": text for name, text in named}


def _check_templates(metadata: Mapping[str, Any], where: str, hint: str) -> None:
    for key, text in metadata.items():
        if not key.startswith(_NAMED_TEMPLATE):
            continue
        if not isinstance(text, str):
            raise BadInputError(f"{where}: {key} is not text", hint)
        # The name becomes that of a file.
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key.removeprefix(_NAMED_TEMPLATE)):
            raise BadInputError(f"{where} has a chat template of a name that is no word: {key!r}", hint)


def tokenizer_files(metadata: Mapping[str, Any], architecture: str, where: str) -> dict[str, bytes]:
    """``tokenizer.json`` and the small files beside it, from GGUF metadata.

    Returns file name -> content: ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json``, and the
    chat templates that the file has. Raises BadInputError as ``check_tokenizer`` does.
    """
    check_tokenizer(metadata, where)
    if metadata["tokenizer.ggml.model"] == "gpt2":
        tokenizer = _byte_level(metadata, where)
    else:
        tokenizer = _sentencepiece(metadata, architecture.startswith("gemma"))
    files = {
        "tokenizer.json": _json(tokenizer, indent=None),
        "tokenizer_config.json": _json(_tokenizer_config(metadata, architecture, where)),
        "generation_config.json": _json(_generation_config(metadata)),
    }
    return files | {name: text.encode() for name, text in chat_templates(metadata).items()}


def _json(data: dict[str, Any], indent: int | None = 2) -> bytes:
    return (json.dumps(data, ensure_ascii=False, indent=indent) + "\n").encode()


def _byte_level(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    rule = pre_tokenizer(metadata, where)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = _token_types(metadata)
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": not rule.splits,
    }
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False} for split in rule.splits
    ]
    if rule.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    return _tokenizer_json(
        added=_added_tokens(tokens, types),
        normalizer={"type": "NFC"} if rule.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, byte_level]} if steps else byte_level,
        post_processor=_template(metadata, rule.adds_bos, tokens) or byte_level | {"trim_offsets": False},
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        model=_bpe(
            _vocabulary(tokens, types),
            [merge.partition(" ")[::2] for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=rule.whole_words,
        ),
    )


def _sentencepiece(metadata: Mapping[str, Any], gemma: bool) -> dict[str, Any]:
    types = _token_types(metadata)
    # Converters write blanks of user-defined tokens as blanks; the model itself knows only U+2581.
    tokens = [
        token.replace(" ", "▁") if kind == USER_DEFINED else token
        for token, kind in zip(metadata["tokenizer.ggml.tokens"], types, strict=True)
    ]
    vocabulary = _vocabulary(tokens, types)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", not gemma)
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is None:
        unknown = next((index for index, kind in enumerate(types) if kind == UNKNOWN), None)
    return _tokenizer_json(
        # Runs of blanks are found by merging: as added tokens they would only match U+2581 typed by a person.
        added=[token for token in _added_tokens(tokens, types) if token["content"].strip("▁")],
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}
        if prefix
        else blanks,
        pre_tokenizer=None,
        post_processor=_template(metadata, True, tokens),
        decoder={"type": "Sequence", "decoders": decoders},
        model=_bpe(
            vocabulary,
            _merges(tokens, types, None if gemma else metadata["tokenizer.ggml.scores"]),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in types,
        ),
    )


def _token_types(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    types: tuple[int, ...] | None = metadata.get("tokenizer.ggml.token_type")
    return types if types is not None else (NORMAL,) * len(metadata["tokenizer.ggml.tokens"])


def _vocabulary(tokens: list[str], types: tuple[int, ...]) -> dict[str, int]:
    """Token -> id, without the ``[PAD123]`` that converters invent to fill the embedding's last rows."""
    padding = re.compile(r"\[PAD\d+\]")
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if not (kind == UNUSED and padding.fullmatch(token))
    }


def _added_tokens(tokens: list[str], types: tuple[int, ...]) -> list[dict[str, Any]]:
    """Control tokens (special) and user-defined ones (plain): both are matched whole, before anything is cut."""
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != USER_DEFINED,
        }
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and token
    ]


def _merges(tokens: list[str], types: tuple[int, ...], scores: tuple[float, ...] | None) -> list[tuple[str, str]]:
    """The merges a SentencePiece BPE vocabulary implies, best first.

    SentencePiece joins the neighbours whose union has the best score; every way to cut a token in two known
    tokens is therefore a merge of that token's rank. Gemma (``scores`` None) ranks by position instead
    (``transformers.convert_slow_tokenizer``).
    """
    known = {token: index for index, token in enumerate(tokens) if types[index] in (NORMAL, USER_DEFINED, UNUSED)}
    # A tab is a byte in most vocabularies, and runs of tabs merge from it.
    if "\t" not in known and "<0x09>" in tokens:
        known["\t"] = tokens.index("<0x09>")
    found: list[tuple[float, int, int, int, str, str]] = []
    for token, index in known.items():
        rank = float(index) if scores is None else -scores[index]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                found.append((rank, index, known[left], known[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _bpe(vocabulary: dict[str, int], merges: Iterable[Iterable[str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": vocabulary,
        "merges": [list(merge) for merge in merges],
    }


def _tokenizer_json(*, added: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts}


def _adds(metadata: Mapping[str, Any], which: str, otherwise: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.add_{which}_token", otherwise))


def _template(metadata: Mapping[str, Any], adds_bos: bool, tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that adds start and end tokens, or None where the model takes neither."""
    bos, eos = (metadata.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "eos"))
    start = [bos] if bos is not None and _adds(metadata, "bos", adds_bos) else []
    end = [eos] if eos is not None and _adds(metadata, "eos", False) else []
    if not start and not end:
        return None

    def sequence(which: str, type_id: int) -> list[dict[str, Any]]:
        def special(token: int) -> dict[str, Any]:
            return {"SpecialToken": {"id": tokens[token], "type_id": type_id}}

        text = {"Sequence": {"id": which, "type_id": type_id}}
        return [*map(special, start), text, *map(special, end)]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": [*sequence("A", 0), *sequence("B", 1)],
        "special_tokens": {
            tokens[token]: {"id": tokens[token], "ids": [token], "tokens": [tokens[token]]}
            for token in dict.fromkeys([*start, *end])
        },
    }


def _tokenizer_config(metadata: Mapping[str, Any], architecture: str, where: str) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    named = {
        f"{role}_token": metadata.get(f"tokenizer.ggml.{kind}_token_id")
        for role, kind in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    adds_bos = sentencepiece or pre_tokenizer(metadata, where).adds_bos
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{role: tokens[token] for role, token in named.items() if token is not None},
        "add_bos_token": _adds(metadata, "bos", adds_bos),
        "add_eos_token": _adds(metadata, "eos", False),
        "clean_up_tokenization_spaces": False,
    }
    context = metadata.get(f"{architecture}.context_length")
    return config | ({"model_max_length": context} if context else {})


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ends = end_token_ids(metadata)
    values = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "temperature": metadata.get("general.sampling.temp"),
        "top_k": metadata.get("general.sampling.top_k"),
        "top_p": metadata.get("general.sampling.top_p"),
        "min_p": metadata.get("general.sampling.min_p"),
        "repetition_penalty": metadata.get("general.sampling.penalty_repeat"),
    }
    return {key: value for key, value in values.items() if value is not None}
