"""The model card: front matter the Hub reads, and a section that says what was done. Drawn from ``mlxq.json``.

A card is shared ground. mlxq owns the part between its two marks and a few keys of the front matter; everything
else is a person's, and stays as it is to the letter.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxq.clean import clean
from mlxq.errors import BadInputError
from mlxq.fold import fold
from mlxq.headers import read_json
from mlxq.methods.formats import Format
from mlxq.methods.rtn import RTN
from mlxq.metrics.metric import chosen, value_text, with_error_text
from mlxq.reading import read_bytes
from mlxq.sources.base import ModelSource

FILE_NAME = "README.md"
LARGEST_HEADER = 4_000_000
BEGIN, END = "<!-- mlxq:begin -->", "<!-- mlxq:end -->"
# Keys taken over from the card of the source, once: from then on they are the person's.
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")
# Tags that name what the source was stored for, which the result is not.
_DROPPED_TAGS = {"gguf", "pytorch", "tf", "jax", "onnx", "transformers", "endpoints_compatible"}


@dataclass(frozen=True)
class Card:
    """What mlxq has to say: ``owned`` and ``carried`` front matter, tags the card must have, and its section."""

    name: str
    owned: Mapping[str, Any]
    carried: Mapping[str, Any]
    tags: tuple[str, ...]
    section: str


def source_metadata(source: ModelSource) -> dict[str, Any]:
    """What a new card takes over from the source's own: licence, languages, pipeline tag and tags."""
    file = None if source.weights_folder is None else source.weights_folder / FILE_NAME
    if file is None or not file.exists():
        return {}
    try:
        original = _metadata(_split(as_text(read_bytes(file)))[0])
    except BadInputError:
        # Somebody else's card with a fault in it is no reason to stop: there is just nothing to take over.
        return {}
    kept = {key: original[key] for key in _CARRIED if original.get(key)}
    if "tags" in kept:
        kept["tags"] = [tag for tag in _tags(original) if tag not in _DROPPED_TAGS]
    # Dates and the like become text, as JSON has it.
    return dict(json.loads(json.dumps(kept, default=str)))


def make_card(report: Mapping[str, Any], name: str, folder: Path, plot: str | None = None) -> Card:
    """The card of the model in ``folder`` from what its ``mlxq.json`` records.

    ``name`` is how to load it, a folder's name or a Hub id; ``plot`` a file beside the card that draws what was
    measured.
    """
    carried = dict(report.get("card") or {})
    base_model = report["source"]["base_model"]
    owned = {"library_name": "mlx"}
    if base_model:
        owned |= {"base_model": base_model, "base_model_relation": "quantized"}
    tags = ["mlx", *(["conversational"] if has_chat_template(folder) else [])]
    if any(part["ability"] for part in report.get("left_out", ())):
        carried["pipeline_tag"] = "text-generation"
    carried.setdefault("pipeline_tag", "text-generation")
    carried["tags"] = list(dict.fromkeys([*tags, *carried.get("tags", ())]))
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
        header = _dump({**card.owned, **card.carried})
        return f"---\n{header}---\n\n# {card.name}\n\n{card.section}\n"
    header, body = _split(existing)
    before, marked, after = _around_section(body)
    wanted = dict(card.owned) if marked else {**card.carried, **card.owned}
    current = _metadata(header)
    tags = list(dict.fromkeys([*_tags(current), *(card.tags if marked else card.carried["tags"])]))
    wanted = {key: value for key, value in wanted.items() if key in card.owned or key not in current}
    for key, value in {**wanted, "tags": tags}.items():
        if current.get(key) != value:
            header = _with_key(header, key, value)
    if old_name is not None:
        before = before.replace(f"\n# {old_name}\n", f"\n# {card.name}\n", 1)
    if not marked:
        before, after = before.rstrip("\n") + "\n\n", "\n"
    return f"---\n{header}---\n{before}{card.section}{after}"


def write_card(report: dict[str, Any], folder: Path, name: str) -> None:
    """Write the card of a model just made, and record its size and hash in ``report``."""
    content = render(make_card(report, name, folder)).encode()
    (folder / FILE_NAME).write_bytes(content)
    report["files"][FILE_NAME] = file_facts(content)


def file_facts(content: bytes) -> dict[str, Any]:
    """Size and SHA-256, as ``mlxq.json`` records them for each file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def as_text(content: bytes) -> str:
    """A card as text with plain line ends, whatever editor it went through."""
    return content.decode("utf-8", errors="replace").removeprefix("\ufeff").replace("\r\n", "\n")


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


def _split(card: str) -> tuple[str, str]:
    """Front matter without its fences, and the rest; empty front matter where there is none."""
    found = re.match(r"---[ \t]*\n(.*?\n|)---[ \t]*(?:\n|\Z)", card, re.DOTALL)
    return (found[1], card[found.end() :]) if found else ("", "\n" + card)


def _metadata(header: str) -> dict[str, Any]:
    import yaml

    # libyaml where PyYAML was built with it: some cards list thousands of results.
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(header) > LARGEST_HEADER:
        raise BadInputError(f"{FILE_NAME}: the front matter has over {LARGEST_HEADER:,} characters")
    try:
        # A few lines of aliases of aliases would be written out as gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(header, loader)):
            raise BadInputError(f"{FILE_NAME}: the front matter has aliases (*name)", "Write out what they stand for.")
        loaded = yaml.load(header, loader) if header.strip() else {}
    except (ValueError, TypeError, AttributeError, RecursionError) as exc:
        # A date that does not exist, a number too long, an object for a key, a tag on what it does not fit.
        raise BadInputError(f"{FILE_NAME}: the front matter holds what is no value: {str(exc)[:200]}") from exc
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        # The opening fence is the first line.
        where = f"{FILE_NAME}:{mark.line + 2}" if mark else FILE_NAME
        raise BadInputError(
            f"{where}: the front matter is no YAML: {getattr(exc, 'problem', None) or exc}",
            "Mend it between the two --- lines, or remove the file to have a new one written.",
        ) from exc
    if not isinstance(loaded, dict):
        raise BadInputError(f"{FILE_NAME}: the front matter is no mapping of keys to values", "Write it as key: value.")
    return loaded


def _tags(metadata: Mapping[str, Any]) -> list[str]:
    tags = metadata.get("tags") or []
    return [str(tag) for tag in (tags if isinstance(tags, list) else [tags])]


def _dump(data: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True))


def _with_key(header: str, key: str, value: Any) -> str:
    """Front matter with one key replaced, or added at its end; every other line stays as it was written."""
    lines = header.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if re.match(rf"""["']?{re.escape(key)}["']?\s*:""", line)]
    if not starts:
        return header + _dump({key: value})
    stop = starts[0] + 1
    # A value goes on while lines are indented, or are items of a list.
    while stop < len(lines) and re.match(r"[ \t]|-|$", lines[stop].rstrip("\n")):
        stop += 1
    return "".join([*lines[: starts[0]], _dump({key: value}), *lines[stop:]])


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
    resolved = _folded("The same with all that it extends, and with --set", _dump(recipe["resolved"]))
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
