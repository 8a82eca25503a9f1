"""Front matter of cards: read as text, changed to the letter, and what cards of sources give or cannot give."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mlxq.errors import BadInputError
from mlxq.pipeline import prepare, run
from mlxq.publish import card
from mlxq.recipe.load import load_recipe
from mlxq.sources.card import card_in, card_of_gguf, model_of_gguf
from mlxq.sources.front_matter import dump, parse, split
from mlxq.sources.resolve import resolve
from tests.checkpoints import llama
from tests.test_gguf import write_gguf


def test_words_and_numbers_are_the_text_that_is_written() -> None:
    tags = "- 1.10\n- 2020-13-45\n- 0o14\n- 1e5\n- y\n- '~'\n"
    assert parse(f"language: [en, no]\nlicense: on\ntags:\n{tags}nothing: ~\nempty:\n").values == {
        "language": ["en", "no"],
        "license": "on",
        "tags": ["1.10", "2020-13-45", "0o14", "1e5", "y", "~"],
        "nothing": None,
        "empty": None,
    }


WORDS = [
    "no",
    "on",
    "y",
    "~",
    "",
    "1.10",
    "1e5",
    "0o14",
    "0x1f",
    "1_000",
    "12:30",
    "2020-01-01",
    ".5",
    "=",
    "<<",
    "*a",
    "? b",
    ".inf",
    "null",
    "TRUE",
]


@given(value=st.one_of(st.sampled_from(WORDS), st.text(st.characters(codec="utf-8", exclude_categories=["C"]))))
def test_what_is_written_is_text_in_both_versions_of_yaml(value: str) -> None:
    written = dump({"tags": [value], "license": value})
    expected = {"tags": [value], "license": value}
    assert yaml.safe_load(written) == expected
    assert YAML(typ="safe", pure=True).load(written) == expected
    assert parse(written).values == expected


PERSONS = """\
# mine
license: mit  # of the code
"tags" : [a,   b]   # in a row
model-index:
- name: x
  results: &r
  - task: {type: text-generation}
    metrics: [ {value: 0.10} ]

# about the data
datasets:
  - one

notes: |
  tags: [none]

again: *r
language:
- de
"""


def test_a_key_is_changed_and_every_other_letter_stays() -> None:
    changed = parse(PERSONS).with_value("tags", ["a", "b", "mlx"]).with_value("language", "no")
    changed = changed.with_value("library_name", "mlx").with_value("datasets", ["two"])
    assert changed.text == (
        PERSONS.replace('"tags" : [a,   b]   # in a row\n', "tags:\n- a\n- b\n- mlx\n")
        .replace("datasets:\n  - one\n", "datasets:\n- two\n")
        .replace("language:\n- de\n", "language: 'no'\nlibrary_name: mlx\n")
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{license: mit, tags: [a]}\n", "'tags' cannot be changed"),
        ("license: mit\n...\n", "'tags' cannot be changed"),
    ],
)
def test_what_cannot_be_changed_alone_is_left_and_said(text: str, said: str) -> None:
    with pytest.raises(BadInputError, match=said) as caught:
        parse(text).with_value("tags", ["a", "mlx"])
    assert "tags: [a, mlx]" in (caught.value.hint or "")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)
HOSTILE = {
    "bomb": BOMB,
    "inside itself": "tags: &a [*a]\n",
    "deep": "tags: " + "[" * 5000 + "]" * 5000 + "\n",
    "tag": "license: !!python/object/apply:os.system ['touch executed']\n",
    "twice": "license: mit\nlicense: gpl\n",
    "second document": "license: mit\n...\nlicense: gpl\n",
    "cut": "license: [mit\n",
    "control": "license: \x1b[31mmit\n",
    "list": "- mit\n",
    "key": "? [a, b]\n: c\n",
    "unknown alias": "license: *nobody\n",
    "long": "x: y\n" * 250_000,
    "date": "license: !!timestamp 2020-13-45\ntags: 9\nlanguage: {a: b}\n",
}


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "date"])
def test_a_hostile_card_is_refused_in_one_line_and_no_time(name: str, tmp_path: Path) -> None:
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(BadInputError) as caught:
        parse(HOSTILE[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("README.md")
    assert caught.value.hint
    assert peak < 100_000_000
    assert time.process_time() - began < 30
    (tmp_path / "README.md").write_text(f"---\n{HOSTILE[name]}---\n")
    assert card_in(tmp_path).values == {}


def test_a_date_that_is_none_is_text_and_what_is_no_text_is_left(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{HOSTILE['date']}---\n")
    found = card_in(tmp_path)
    assert found.values == {"license": "2020-13-45", "tags": ["9"]}
    assert found.fault is None


def test_a_source_with_a_hostile_card_is_converted_and_the_card_said_to_be_ignored(tmp_path: Path) -> None:
    source = llama(tmp_path / "source")
    (source / "README.md").write_text(f"---\n{BOMB}license: mit\n---\n")
    plan = prepare(load_recipe("4bit"), resolve(str(source)))
    (remark,) = plan.remarks
    assert remark.startswith("nothing is taken over from the card of the source: README.md")
    *_, _ = run(plan, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert remark in text
    assert "license" not in parse(split(text)[0]).values


def of_gguf(tmp_path: Path, **metadata: str | list[str]) -> dict[str, Any]:
    """Front matter of what is made from a GGUF file with ``general`` metadata."""

    def edit(writer: gguf.GGUFWriter) -> None:
        for name, value in metadata.items():
            key = f"general.{name.replace('__', '.')}"
            writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)

    file = write_gguf(tmp_path / "m.gguf", edit=edit)
    *_, _ = run(prepare(load_recipe("4bit"), resolve(str(file))), tmp_path / "out")
    return dict(parse(split((tmp_path / "out" / "README.md").read_text())[0]).values)


def test_a_gguf_file_has_a_card_in_its_metadata(tmp_path: Path) -> None:
    found = of_gguf(
        tmp_path,
        name="Tiny Chat",
        license="other",
        license__name="tiny-licence",
        license__link="https://example.org/licence",
        languages=["en", "no"],
        tags=["gguf", "chat", "1.10", "image-text-to-text"],
        base_model__0__name="Tiny",
        base_model__0__repo_url="https://huggingface.co/org/tiny",
        base_model__1__repo_url="https://huggingface.co/org/other",
    )
    assert found == {
        "library_name": "mlx",
        "license": "other",
        "license_name": "tiny-licence",
        "license_link": "https://example.org/licence",
        "language": ["en", "no"],
        "base_model": ["org/tiny", "org/other"],
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "conversational", "chat", "1.10"],
    }


@pytest.mark.parametrize(
    ("metadata", "model", "bases"),
    [
        ({}, "org/a", "org/a"),
        ({"name": "A 1", "base_model.0.name": "a-1"}, "org/a", "org/a"),
        ({"name": "A Chat", "base_model.0.name": "A"}, None, "org/a"),
        ({"source.url": "https://hf.co/org/b"}, "org/b", "org/a"),
        ({"base_model.0.repo_url": "https://example.org/org/a", "repo_url": 7}, None, None),
    ],
)
def test_the_model_in_a_gguf_file_is_not_taken_for_the_one_it_was_made_from(
    metadata: dict[str, Any], model: str | None, bases: str | None
) -> None:
    base = {"base_model.0.repo_url": "https://huggingface.co/org/a"}
    general = {f"general.{key}": value for key, value in (base | metadata).items()}
    assert model_of_gguf(general) == model
    assert card_of_gguf(general).values.get("base_model") == ([bases] if bases else None)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ("text-generation", "text-generation"),
        ("text-ranking", "text-ranking"),
        ("image-text-to-text", "text-generation"),
        ("text-classification", "text-generation"),
        ("no", "text-generation"),
    ],
)
def test_a_pipeline_tag_is_one_that_the_model_can_do(tmp_path: Path, stated: str, said: str) -> None:
    module = {"path": "model.layers.0.mlp.up_proj", "shape": [4, 4], "nbytes": 8, "format": None, "dtype": "BF16"}
    report = {
        "source": {"base_model": None, "kind": "safetensors", "name": "x", "revision": None},
        "card": {"pipeline_tag": stated, "tags": ["image-text-to-text", "vision", "mine"]},
        "modules": [module],
        "metrics": {"size_bytes": 8, "source_bytes": 32, "bits_per_weight": 4.0},
        "versions": {},
        "notes": [],
        "recipe": {"name": "r", "text": "", "resolved": {}},
        "left_out": [],
    }
    text_only = card.make_card(report, "m", tmp_path)
    assert text_only.carried["pipeline_tag"] == said
    assert text_only.carried["tags"] == ["mlx", "mine"]
    module["path"] = "vision_tower.layers.0.fc1"
    assert card.make_card(report, "m", tmp_path).carried["tags"] == ["mlx", "image-text-to-text", "vision", "mine"]
    report["left_out"] = [{"ability": True}]
    assert card.make_card(report, "m", tmp_path).carried["pipeline_tag"] == said


ODD_LINES = [
    "tags:",
    "- a",
    "  b: c",
    "tags: &x [a",
    "]",
    "? k",
    ": v",
    "...",
    "%YAML 1.1",
    "*x",
    "",
    "{a: b}",
    "tags: >-",
    "\ttab",
    "key: 'open",
    "a: ",
    "-",
]
LINES = st.lists(
    st.one_of(st.sampled_from(PERSONS.splitlines()), st.sampled_from(ODD_LINES), st.text(max_size=12)), max_size=12
)


@settings(max_examples=500, deadline=None)
@given(lines=LINES)
def test_any_front_matter_is_read_or_refused_and_changed_to_the_letter_or_refused(lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    said = ""
    try:
        before = parse(text)
        after = before.with_value("tags", ["mlx", "no"])
    except BadInputError as exc:
        said = exc.message
    assert "\n" not in said
    if said:
        return
    assert {**before.values, "tags": ["mlx", "no"]} == after.values
    kept = text.splitlines(keepends=True)
    start, stop = before.lines.get("tags", (len(kept), len(kept)))
    assert after.text == "".join([*kept[:start], dump({"tags": ["mlx", "no"]}), *kept[stop:]])
