"""Every command and every recipe in README and docs/, run on small stand-ins for the models that they name.

A block is run as it is written, in a folder of its own with a Hub on loopback. What it takes for given (``MODEL``,
``./my-model``, ``org/llama-70b``) is made first, by ``FOLDERS``, ``FILES`` and ``MODELS`` below. A comment above it
says where it is run instead, ``<!-- run by .ci/run -->``, or why it is not, ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import gguf
import pytest
import typer.main
import yaml

from mlxq.cli import app, main
from tests import checkpoints
from tests.documents import DOCUMENTS, ROOT, Block, blocks, inline_code, missing_lines, prose
from tests.gguf_files import write_gguf
from tests.hub_server import Hub

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
RUN = [block for block in BLOCKS if block.language in ("bash", "console") and block.mark is None]
PYTHON = [document for document in DOCUMENTS if any(block.language == "python" for block in blocks(document))]
YAML = [block for block in BLOCKS if block.language == "yaml"]
RECIPES = [block for block in YAML if "jobs" not in yaml.safe_load(block.text)]

# -- what the documents take for given


def stand_in(folder: Path, **changes: Any) -> Path:
    """A Llama whose tokenizer makes a token of a phrase, so that the shipped texts are short."""
    checkpoints.llama(folder, hidden_size=64, intermediate_size=64, **changes)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    between = {"Regex": r"[.,;:\n]"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": between, "behavior": "Removed", "invert": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def small(folder: Path) -> Path:
    return stand_in(folder, num_hidden_layers=1)


def tied(folder: Path) -> Path:
    """As Llama-3.2-3B and SmolLM2 are: no head of its own, and layers enough to be told apart."""
    return stand_in(folder, num_hidden_layers=9, tie_word_embeddings=True)


def quantized(folder: Path, original: str = "", recipe: str = "4bit") -> Path:
    """A model that mlxq wrote, and measured."""
    name = original or str(small(folder.with_name(f"{folder.name}-original")))
    assert mlxq("quantize", recipe, "--model", name, "-o", str(folder), "--no-generate")[0] == 0
    assert mlxq("compare", name, str(folder), "--no-speed", "--tokens", "512")[0] == 0
    return folder


def spoilt(folder: Path) -> None:
    with (quantized(folder) / "model.safetensors").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x55")


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(("MODEL", "A", "B", "C", "my-model", "original", "smol"), small),
    "sample": tied,
    **dict.fromkeys(("OUT", "my-model-4bit", "original-4bit"), quantized),
    "SmolLM2-135M-mlx": lambda folder: quantized(folder, SMOLLM2, "quickstart"),
    "spoilt": spoilt,
}
FIRST_RECIPE = next(block.text for block in RECIPES if block.where.startswith("docs/recipes.md"))
FAULTY = "default:\n  # no such group size\n  bits: 4\n  group_size: 48\nrules:\n  - match: lm_head\n    bitz: 6\n"
FILES: dict[str, str] = {
    "recipe.yaml": FIRST_RECIPE,
    "RECIPE.yaml": FIRST_RECIPE,
    "my.yaml": FAULTY,
    "notes.txt": "The quick brown fox jumps over the lazy dog. " * 100,
    **{f"{bits}bit.yaml": f"default: {{bits: {bits}, group_size: 64}}" for bits in (3, 5, 6)},
}
MODELS: dict[str, Callable[[Path], Path]] = {
    SMOLLM2: tied,
    "meta-llama/Llama-3.2-3B-Instruct": tied,
    "org/llama-70b": lambda folder: stand_in(folder, num_hidden_layers=9, shards=30),
    "org/gated": small,
    "org/small": small,
}
COLLECTIONS = ("org/small-models-0123456789ab", "org/my-models-0123456789ab")


def gate(hub: Hub) -> None:
    hub.repos["org/gated"].gated = "manual"
    hub.approved.clear()


# What goes wrong on the Hub, by words that a block shows.
FAULTS: dict[str, Callable[[Hub], Any]] = {
    "is gated": gate,
    "trying again in 2": lambda hub: hub.fail("GET", "/org/small/revision", status=429, headers={"Retry-After": "0"}),
    "trying again in 3": lambda hub: hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "0"}),
}


def mlxq(*arguments: str) -> tuple[int, str]:
    """The exit code of a command, run in this process, and what it showed on stdout and stderr."""
    shown, before = io.StringIO(), sys.argv
    sys.argv = ["mlxq", *arguments]
    try:
        with redirect_stdout(shown), redirect_stderr(shown):
            main()
    except SystemExit as exit_:
        return int(exit_.code or 0), shown.getvalue()
    finally:
        sys.argv = before
    return 0, shown.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], Any]], Path]:
    """Folders by name, each made once."""
    there = tmp_path_factory.mktemp("given")

    def make(name: str, build: Callable[[Path], Any]) -> Path:
        folder = there / name
        if not folder.exists():
            build(folder)
        return folder

    return make


@pytest.fixture
def give(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[str, Callable[[Path], Any]], Path]
) -> Callable[[str], None]:
    """Make what a text names, in an empty folder of its own that is also where commands run, and on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")

    def give_(text: str) -> None:
        for collection in COLLECTIONS:
            hub.collections[collection] = []
        names = {name.removeprefix("./").partition("@")[0] for name in re.split(r"[\s?=,\[\]{}:'\"]+", text)}
        if "recipes/quickstart.yaml" in text:
            names.add("sample")
        results = {name.removeprefix("./") for name in re.findall(r"-o (\S+)", text)}
        if "SmolLM2-135M-mlx" in names:
            names.add(SMOLLM2)
        for name in names & MODELS.keys():
            hub.add_model(name, made(name, MODELS[name]))
        for name in names & FILES.keys():
            Path(name).write_text(FILES[name])
            give_(FILES[name])
        for name in (names & FOLDERS.keys()) - results:
            shutil.copytree(made(name, FOLDERS[name]), name)
        if "model.gguf" in names:
            write_gguf(Path("model.gguf"), types={"model.embed_tokens.weight": gguf.GGMLQuantizationType.Q4_0})
        for words, fault in FAULTS.items():
            if words in text:
                fault(hub)

    return give_


def run(command: str) -> tuple[int, str]:
    """Run a line of a document. ``sample``, which a test cannot fetch, is a folder of that name."""
    words = shlex.split(command, comments=True)
    words, target = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
    assert words[0] == "mlxq", f"{command}: say why it is not run, or teach this test to run it"
    arguments = ["./sample" if word == "sample" else word for word in words[1:]]
    if "recipes/quickstart.yaml" in arguments:
        arguments += ["--model", "./sample"]
    code, output = mlxq(*arguments)
    if target:
        Path(target).write_text(output)
    return code, output


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.where)
def test_commands_do_what_is_shown(block: Block, give: Callable[[str], None], hub: Hub) -> None:
    give(block.text)
    for command, shown in block.commands:
        code, output = run(command)
        fails = any(line.startswith("error:") for line in shown)
        assert (code != 0) == fails, f"{command}\n{output}"
        assert not missing_lines(shown, output.replace(hub.url, "https://huggingface.co")), f"{command}\n{output}"


@pytest.mark.parametrize("document", PYTHON, ids=lambda document: document.name)
def test_examples_in_python_run(document: Path, give: Callable[[str], None], hub: Hub) -> None:
    """One after the other in a process of their own, as somebody who reads on would type them."""
    code = "\n".join(block.text for block in blocks(document) if block.language == "python")
    give(code.replace("./my-model-4bit", ""))  # made by the first of them
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **hub.env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("my-model-4bit", "100%", "bits", f"{hub.url}/org/my-model-4bit"):
        assert said in done.stdout
    assert hub.repos["org/my-model-4bit"].private


@pytest.mark.parametrize("block", RECIPES, ids=lambda block: block.where)
def test_recipes_make_a_model(block: Block, give: Callable[[str], None]) -> None:
    give(block.text)
    Path("a-recipe.yaml").write_text(block.text)
    names_model = "model" in yaml.safe_load(block.text)
    if not names_model:
        give("MODEL")
    model = () if names_model else ("--model", "MODEL")
    code, output = mlxq("quantize", "a-recipe.yaml", "-o", "made", "--no-generate", *model)
    assert code == 0, output
    assert json.loads(Path("made/mlxq.json").read_text())["recipe"]["name"] == "a-recipe"


# -- and nothing escapes the tests above


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_no_command_is_hidden(document: Path) -> None:
    """A command stands in a block that says it is one, or in a line of prose, where it is at least parsed."""
    for block in blocks(document):
        if block.language not in ("bash", "console"):
            assert not re.search(r"^(\$ |mlxq |pip |python )", block.text, re.MULTILINE), block.where
    assert not re.search(r"^    +(\$ |mlxq |pip |python )", prose(document), re.MULTILINE)


def parse(command: Any, words: list[str]) -> None:
    """Check that a command and its options exist; nothing is run, not even an option that acts at once."""
    commands = getattr(command, "commands", None)
    if commands is None:
        if words:
            command.make_context(command.name, words)
    elif words and words[0].startswith("-"):
        assert words[0] in {name for option in command.params for name in option.opts} | {"--help"}
    elif words:
        parse(commands[words[0]], words[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_in_prose_exist(document: Path) -> None:
    for code in inline_code(document):
        words = code.split()
        if words[0] == "mlxq":
            parse(typer.main.get_command(app), words[1:])
        if words[0] == "python" and words[1].endswith(".py"):
            done = subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_what_is_not_run_says_why_and_is_little() -> None:
    marked = [block for block in BLOCKS if block.mark is not None]
    script = (ROOT / ".ci" / "run").read_text()
    for block in marked:
        if block.mark == "run by .ci/run":
            for line in block.text.strip().split(" && "):
                assert line in script, f"{block.where}: .ci/run does not run {line!r}"
        else:
            assert re.fullmatch(r"not run: \w+( \S+){3,}", block.mark or ""), block.where
    assert len(marked) <= 3
