"""The model card: front matter the Hub reads, and a section that says what was done. Drawn from ``mlxq.json``.

A card is shared ground. mlxq owns the part between its two marks and a few keys of the front matter; everything
else is a person's, and stays as it is to the letter.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.clean import clean
from mlxq.errors import BadInputError
from mlxq.families import part_of
from mlxq.fold import fold
from mlxq.headers import read_json
from mlxq.methods.formats import Format
from mlxq.methods.rtn import RTN
from mlxq.metrics.metric import chosen, value_text, with_error_text
from mlxq.sources.card import taken_over
from mlxq.sources.front_matter import FILE_NAME, dump, parse, split

BEGIN, END = "<!-- mlxq:begin -->", "<!-- mlxq:end -->"
# What a model can do that reads and writes text, and what takes a tower for images or sound besides.
_OF_TEXT = frozenset({"text-generation", "text-ranking", "feature-extraction", "sentence-similarity"})
_BEYOND_TEXT = frozenset(
    {
        *("any-to-any", "audio-text-to-text", "automatic-speech-recognition", "image-text-to-text", "image-to-text"),
        *("multimodal", "video-text-to-text", "vision", "visual-question-answering"),
    }
)


@dataclass(frozen=True)
class Card:
    """What mlxq has to say: ``owned`` and ``carried`` front matter, tags the card must have, and its section."""

    name: str
    owned: Mapping[str, Any]
    carried: Mapping[str, Any]
    tags: tuple[str, ...]
    section: str


def make_card(report: Mapping[str, Any], name: str, folder: Path, plot: str | None = None) -> Card:
    """The card of the model in ``folder`` from what its ``mlxq.json`` records.

    ``name`` is how to load it, a folder's name or a Hub id; ``plot`` a file beside the card that draws what was
    measured.
    """
    carried = taken_over(report.get("card") or {})
    base_model = report["source"]["base_model"]
    owned = {"library_name": "mlx"}
    if base_model:
        owned |= {"base_model": base_model, "base_model_relation": "quantized"}
        carried.pop("base_model", None)
    tags = ["mlx", *(["conversational"] if has_chat_template(folder) else [])]
    carried["tags"] = list(dict.fromkeys([*tags, *carried.get("tags", ())]))
    if not _has_towers(report):
        stated = carried.get("pipeline_tag")
        carried["pipeline_tag"] = stated if stated in _OF_TEXT else "text-generation"
        carried["tags"] = [tag for tag in carried["tags"] if tag not in _BEYOND_TEXT]
    parts = (_summary(report), _use(name, folder), _done(report), _measured(report, plot), _reproduce(report, name))
    note = "<!-- Rewritten by mlxq at each upload. What is written outside these marks stays. -->"
    section = clean("\n\n".join([f"{BEGIN}\n{note}", *(part for part in parts if part), END]))
    return Card(name.rpartition("/")[2], owned, carried, tuple(tags), section)


def render(card: Card, existing: str | None = None, *, old_name: str | None = None) -> str:
    """The text of the card: new, or ``existing`` with mlxq's section and keys brought up to date.

    A card without mlxq's marks gets the section at its end and takes over what the source's card said. A title
    that is just ``old_name`` follows the model's name. Raises BadInputError where the marks or the front matter of
    ``existing`` cannot be read.
    """
    if existing is None:
        header = dump({**card.owned, **card.carried})
        return f"---\n{header}---\n\n# {card.name}\n\n{card.section}\n"
    header, body = split(existing)
    before, marked, after = _around_section(body)
    wanted = dict(card.owned) if marked else {**card.carried, **card.owned}
    matter = parse(header)
    tags = list(dict.fromkeys([*_tags(matter.values), *(card.tags if marked else card.carried["tags"])]))
    wanted = {key: value for key, value in wanted.items() if key in card.owned or key not in matter.values}
    for key, value in {**wanted, "tags": tags}.items():
        if matter.values.get(key) != value:
            matter = matter.with_value(key, value)
    if old_name is not None:
        before = before.replace(f"\n# {old_name}\n", f"\n# {card.name}\n", 1)
    if not marked:
        before, after = before.rstrip("\n") + "\n\n", "\n"
    return f"---\n{matter.text}---\n{before}{card.section}{after}"


def write_card(report: dict[str, Any], folder: Path, name: str) -> None:
    """Write the card of a model just made, and record its size and hash in ``report``."""
    content = render(make_card(report, name, folder)).encode()
    (folder / FILE_NAME).write_bytes(content)
    report["files"][FILE_NAME] = file_facts(content)


def file_facts(content: bytes) -> dict[str, Any]:
    """Size and SHA-256, as ``mlxq.json`` records them for each file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def own_words(card: str) -> str:
    """What a person may have written: all of a card but mlxq's section."""
    before, _, after = _around_section(card)
    return f"{before.rstrip()}\n{after.strip()}".strip()


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` brings one."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    try:
        return settings.is_file() and bool(read_json(settings).get("chat_template"))
    except BadInputError:
        # A copy of the source's, damaged as that is: no loader finds a template in it either.
        return False


# Reading and changing a card.


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    tags = metadata.get("tags") or []
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]


def _has_towers(report: Mapping[str, Any]) -> bool:
    """Whether the model reads more than text: it has the parts for it, and none of them was left out."""
    if any(part["ability"] for part in report.get("left_out", ())):
        return False
    parts = (part_of(module["path"]) for module in report["modules"])
    return any(part is not None and part.ability for part in parts)


def _around_section(text: str) -> tuple[str, bool, str]:
    """What stands before mlxq's section, whether there is one, and what stands after."""
    counts = text.count(BEGIN), text.count(END)
    if counts == (0, 0):
        return text, False, ""
    begin, end = text.find(BEGIN), text.find(END)
    if counts != (1, 1) or end < begin:
        raise BadInputError(
            f"{FILE_NAME}: the marks of mlxq's section do not pair up",
            f"Keep one {BEGIN} and, after it, one {END}; or remove both to have the section added at the end.",
        )
    return text[:begin], True, text[end + len(END) :]


# The section.


def _summary(report: Mapping[str, Any]) -> str:
    metrics = report["metrics"]
    size, before = metrics["size_bytes"], metrics["source_bytes"]
    kind = " of GGUF" if report["source"]["kind"] == "gguf" else ""
    return (
        f"{_origin(report)} for [MLX](https://github.com/ml-explore/mlx): "
        f"**{metrics['bits_per_weight']:.2f} bits per weight, {value_text('size_bytes', size)}** "
        f"(from {value_text('size_bytes', before)}{kind}). Made with mlxq."
    )


def _origin(report: Mapping[str, Any]) -> str:
    source = report["source"]
    if source["base_model"]:
        return f"[{source['base_model']}](https://huggingface.co/{source['base_model']})"
    # A path on the machine it was made on means nothing to a reader.
    return f"`{Path(source['name']).name}`"


def _use(name: str, folder: Path) -> str:
    prompt = ["prompt = tokenizer.encode(question)"]
    if has_chat_template(folder):
        prompt = [
            'messages = [{"role": "user", "content": question}]',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)",
        ]
    lines = [
        "## How to use it",
        "",
        "```bash",
        "pip install mlx-lm",
        f'mlx_lm.generate --model {name} --prompt "Why is the sky blue?"',
        "```",
        "",
        "```python",
        "from mlx_lm import generate, load",
        "",
        f'model, tokenizer = load("{name}")',
        'question = "Why is the sky blue?"',
        *prompt,
        "print(generate(model, tokenizer, prompt=prompt))",
        "```",
    ]
    if "/" in name:
        lines += ["", f"In LM Studio, search for `{name}`, or run `lms get https://huggingface.co/{name}`."]
    return "\n".join(lines)


def _done(report: Mapping[str, Any]) -> str:
    folded = fold([(module["path"], _stored_as(module)) for module in report["modules"]])
    facts = {module["path"]: (module["nbytes"], math.prod(module["shape"])) for module in report["modules"]}
    rows = []
    for row in folded:
        nbytes = sum(facts[path][0] for path in row.members)
        weights = sum(facts[path][1] for path in row.members)
        rows.append(
            f"| `{row.path}` | {row.attributes} | {nbytes * 8 / max(weights, 1):.2f} |"
            f" {value_text('size_bytes', nbytes)} |"
        )
    versions = ", ".join(f"{tool} {version}" for tool, version in report["versions"].items())
    lines = ["## What was done", "", "| modules | stored as | bits per weight | size |", "|---|---|---:|---:|", *rows]
    if report["notes"]:
        lines += ["", *(f"- {note}" for note in report["notes"])]
    recipe = report["recipe"]
    written = _folded(f"Recipe: {recipe['name']}", recipe["text"])
    resolved = _folded("The same with all that it extends, and with --set", dump(recipe["resolved"]))
    return "\n".join([*lines, "", f"Versions: {versions}.", "", written, "", resolved])


def _folded(title: str, text: str) -> str:
    """YAML that unfolds at a click, in a fence longer than any in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    lines = [f"<details><summary>{title}</summary>", "", f"{fence}yaml", text.rstrip(), fence, "", "</details>"]
    return "\n".join(lines)


def _stored_as(module: Mapping[str, Any]) -> str:
    fmt = module["format"]
    if fmt is None:
        return str(module["dtype"])
    # Reports from before methods were recorded have rounding alone.
    method = module.get("method", RTN.name)
    how = "" if method == RTN.name else f", by {method}"
    return f"{Format.from_config(fmt).in_words()}{how}"


def _measured(report: Mapping[str, Any], plot: str | None) -> str | None:
    found = report.get("comparison")
    if not found:
        return None
    values = {**found["metrics"], **dict.fromkeys(found["nan"], math.nan)}
    # How far it is from the original comes first, then what it takes to run.
    rows = sorted(chosen(lambda metric: metric.card is not None, [values]), key=lambda row: row.table != "distance")
    text = found["text"]
    # A GGUF file is a quantization of the model it names, not that model.
    reference = "that GGUF file" if report["source"]["kind"] == "gguf" else _origin(report)
    verdict = str(found["verdict"]).removeprefix(f"{found['name']} is ")
    notes = [
        f"Compared with {reference} by `mlxq compare` on {text['name']}, {text['tokens']} tokens, "
        f"SHA-256 `{text['sha256'][:16]}`.",
        *found["notes"],
    ]
    if floor := found.get("noise_floor_kl_mean"):
        notes.append(f"Differences of KL below {value_text('kl_mean', floor)} are noise.")
    if timing := found.get("timing"):
        notes.append(f"Timed on: {timing['device']}.")
    lines = ["## What it cost", "", f"It is {verdict}.", "", "| | |", "|---|---:|"]
    lines += [f"| {row.card} | {with_error_text(row.name, values)} |" for row in rows]
    if plot is not None:
        lines += ["", f"![Bits per weight of each layer, and how far single tokens are from the original]({plot})"]
    return "\n".join([*lines, "", " ".join(notes)])


def _reproduce(report: Mapping[str, Any], name: str) -> str:
    source = report["source"]
    known = source["base_model"] and source["revision"]
    where = "" if known or source["name"] == "sample" else " --model THE-ORIGINAL"
    command = f"mlxq quantize --locked mlxq.json{where} -o rebuilt"
    if "/" in name:
        command = f"hf download {name} mlxq.json --local-dir . && {command}"
    at = f", of commit `{source['revision']}`" if known else ""
    return f"## Make it again\n\nThe same bytes, from the same original{at}:\n\n```bash\n{command}\n```"
