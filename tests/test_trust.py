"""Nothing of a stranger's runs, is copied, or is sent that the person at the command line did not allow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxq.errors import BadInputError
from mlxq.pipeline import Finished, prepare, prepare_locked, recorded_model, run
from mlxq.places import place_in, without_places
from mlxq.planning.plan import Plan
from mlxq.publish.check import check_folder
from mlxq.recipe.load import load_recipe
from mlxq.show.plan_tables import plan_notes
from mlxq.sources import belongings
from mlxq.sources.belongings import travels
from mlxq.sources.resolve import resolve
from mlxq.sources.safetensors import open_folder
from mlxq.writing.report import plan_facts
from tests.checkpoints import llama, make_tokenizer

PACKAGE = Path(__file__).parents[1] / "mlxq"
MLXQ = (sys.executable, "-m", "mlxq")


def with_own_model(folder: Path, marker: Path) -> Path:
    """A Llama whose config names a model file, which leaves ``marker`` behind when it runs."""
    llama(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "model_file": "mine.py"}))
    (folder / "mine.py").write_text(
        f"open({str(marker)!r}, 'a').close()\nfrom mlx_lm.models.llama import Model, ModelArgs\n"
    )
    return folder


def with_own_tokenizer(folder: Path, marker: Path) -> Path:
    """A Llama whose tokenizer is code, which leaves ``marker`` behind when it runs."""
    llama(folder)
    make_tokenizer(folder)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    settings = {"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tok.py").write_text(f"open({str(marker)!r}, 'a').close()\n")
    return folder


def made(plan: Plan, out: Path) -> dict[str, Any]:
    *_, last = run(plan, out)
    assert isinstance(last, Finished)
    return last.report


# Code.


def test_a_report_made_with_trust_is_refused_without_it(tmp_path: Path) -> None:
    source = with_own_model(tmp_path / "model", tmp_path / "ran")
    report = made(prepare(load_recipe("4bit"), resolve(str(source), trusted=True)), tmp_path / "out")
    assert report["options"]["trust_remote_code"]
    assert (tmp_path / "out" / "mine.py").read_bytes() == (source / "mine.py").read_bytes()
    assert check_folder(tmp_path / "out", trusted=True).problems == ()
    (tmp_path / "ran").unlink()
    for refused in (
        lambda: prepare_locked(report, resolve(str(source))),
        lambda: check_folder(tmp_path / "out"),
        lambda: check_folder(tmp_path / "out", force=True),
    ):
        with pytest.raises(BadInputError, match="made with --trust-remote-code") as caught:
            refused()
        assert "add --trust-remote-code" in str(caught.value.hint)
    assert not (tmp_path / "ran").exists()
    assert prepare_locked(report, resolve(str(source), trusted=True)).options == report["options"]


def test_a_report_cannot_grant_trust_at_the_command_line(tmp_path: Path) -> None:
    llama(tmp_path / "model")
    source = resolve(str(tmp_path / "model"))
    report = made(prepare(load_recipe("4bit"), source), tmp_path / "out")
    report["options"]["trust_remote_code"] = True
    report["source"]["name"] = str(with_own_model(tmp_path / "evil", tmp_path / "ran"))
    (tmp_path / "out" / "mlxq.json").write_text(json.dumps(report))
    for command in (
        ("quantize", "--locked", str(tmp_path / "out" / "mlxq.json"), "--dry-run"),
        ("upload", str(tmp_path / "out"), "org/name", "--dry-run", "--force"),
    ):
        result = subprocess.run([*MLXQ, *command], input="y\n" * 99, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("error: ") == 1
        assert "--trust-remote-code" in result.stderr
    assert not (tmp_path / "ran").exists()


COMMANDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "inspect": lambda model: ("inspect", model, "--text", "hello"),
    "quantize, and ask": lambda model: (
        "quantize",
        "4bit",
        "-m",
        model,
        "-o",
        "asked",
        "--set",
        "default.group_size=32",
    ),
    "a budget": lambda model: ("quantize", model, "--bpw", "5", "-o", "spent"),
    "compare": lambda model: ("compare", model, "8bit", "--tokens", "512"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_tokenizers_code_does_not_run_whatever_stdin_says(command: str, tmp_path: Path) -> None:
    model = with_own_tokenizer(tmp_path / "model", tmp_path / "ran")
    result = subprocess.run(
        [*MLXQ, *COMMANDS[command](str(model))], input="y\n" * 99, capture_output=True, text=True, cwd=tmp_path
    )
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert result.returncode in (0, 2)
    assert "wants to run its own code" in result.stderr


def test_compare_runs_trusted_code_and_only_that(tmp_path: Path) -> None:
    model = with_own_model(tmp_path / "model", tmp_path / "ran")
    command = [*MLXQ, "compare", str(model), "8bit", "--tokens", "512", "--no-speed"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "add --trust-remote-code" in refused.stderr
    assert not (tmp_path / "ran").exists()
    subprocess.run([*command, "--trust-remote-code"], capture_output=True, text=True)
    assert (tmp_path / "ran").exists()


def test_tokenizers_are_opened_in_one_place() -> None:
    callers = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if re.search(r"AutoTokenizer\.|import AutoTokenizer|upstream\.load_tokenizer\(|\binput\(", file.read_text())
    }
    # ``upstream`` names what it expects of it in a docstring.
    assert callers == {"architecture/tokenizer.py", "upstream.py"}


# Links.


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "README.md", "additional_chat_templates/x.jinja"])
def test_a_link_out_of_the_folder_is_left_behind_and_named(name: str, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (tmp_path / "secret").write_text("---\nlicense: hf_secret\n---\n")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    source = resolve(str(model))
    assert name not in source.sidecars
    assert source.card.values == {}
    plan = prepare(load_recipe("4bit"), source)
    assert f"left behind, a link out of the model's folder: {name}" in plan_notes(plan)
    assert plan_facts(plan)["left_behind"][name] == belongings.LINK
    made(plan, tmp_path / "out")
    assert not [f for f in (tmp_path / "out").rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_what_is_opened_is_no_link_out_of_the_folder(name: str, tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / name).touch()
    (model / name).rename(tmp_path / "elsewhere")
    (model / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInputError, match=f"{name} is a link out of the model's folder") as caught:
        open_folder(model, "m")
    assert "where the files really lie" in str(caught.value.hint)


def test_links_that_stay_with_the_model_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    blobs.mkdir(parents=True)
    llama(snapshot)
    make_tokenizer(snapshot)
    for file in sorted(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    os.link(blobs / "config.json", tmp_path / "other")
    (snapshot / "LICENSE").symlink_to(snapshot / "config.json")
    (snapshot / "NOTICE").symlink_to(tmp_path / "other")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        found = resolve(str(folder))
        assert {"tokenizer.json", "LICENSE"} <= found.sidecars.keys()
        assert found.left_behind == {"NOTICE": belongings.LINK}
    # The same files under names that the Hub's cache does not use are somebody's own links.
    repository.rename(tmp_path / "mine")
    with pytest.raises(BadInputError, match="link out"):
        resolve(str(tmp_path / "mine" / "snapshots" / "0123abc"))


# What travels.


def test_what_travels_is_a_list() -> None:
    along = (
        "tokenizer.json tokenizer_config.json tokenizer.model spiece.model qwen.tiktoken vocab.json vocab.txt "
        "merges.txt "
        "added_tokens.json special_tokens_map.json chat_template.jinja chat_template.json preprocessor_config.json "
        "processor_config.json video_preprocessor_config.json generation_config.json LICENSE LICENSE.txt LICENCE.md "
        "MODEL_LICENSE NOTICE USE_POLICY.md additional_chat_templates/tool_use.jinja"
    )
    assert [name for name in along.split() if not travels(name, trusted=False)] == []
    behind = (
        "notes.txt .env id_rsa token credentials.json training_args.bin optimizer.pt adapter_config.json tok.py "
        "original/tokenizer.model additional_chat_templates/a/b.jinja other/x.jinja license.safetensors recipe.yaml"
    )
    assert [name for name in behind.split() if travels(name, trusted=False)] == []
    assert travels("tok.py", trusted=True)


def test_what_stays_behind_is_said_in_a_line(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    for name in ("credentials.json", "a.txt", "b.txt", "c.txt", "d.txt", "tok.py", ".hidden", "LICENSE"):
        (model / name).write_text("x")
    plan = prepare(load_recipe("4bit"), resolve(str(model)))
    lines = [line for line in plan.notes if line.startswith("left behind")]
    assert lines == [
        "left behind, code, and the model is not trusted: tok.py",
        "left behind, no part of an MLX model: a.txt, b.txt, c.txt, credentials.json and 1 more",
    ]
    report = made(plan, tmp_path / "out")
    assert set(report["left_behind"]) == {"credentials.json", "a.txt", "b.txt", "c.txt", "d.txt", "tok.py"}
    assert "LICENSE" in report["files"]
    assert not report["left_behind"].keys() & report["files"].keys()


# Places.


def test_a_report_holds_no_place_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "an odd folder's" / "r"
    odd.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(odd)
    model = llama(tmp_path / "model")
    (odd / "base.yaml").write_text("default: {bits: 4, group_size: 32}\nrules:\n  - {match: down_proj, bits: 8}\n")
    (odd / "cal.txt").write_text("x")
    text = f'# by {tmp_path}/me\nextends: "{odd}/base.yaml"\nmodel: {model}\noutput: "{odd}/out"\n'
    text += f'method: auto\ncalibration: {{text: "{odd}/cal.txt"}}\nrules:\n  - {{match: q_proj, bits: 6}}\n'
    (odd / "my.yaml").write_text(text)
    recipe = load_recipe(str(odd / "my.yaml"), ["rules.0.bits=5"])
    report = made(prepare(load_recipe(str(odd / "base.yaml")), resolve(str(model))), tmp_path / "out")
    assert {"base.yaml:3 rules[0]", "default"} == {module["decided_by"] for module in report["modules"]}
    assert report["source"]["name"] == "model"
    written = without_places({"text": recipe.text, **recipe.resolved()}, [str(odd / "cal.txt"), str(odd / "out")])
    for shown in (json.dumps(report), json.dumps(written), (tmp_path / "out" / "mlxq.json").read_text()):
        assert str(tmp_path) not in shown
        assert place_in(shown) is None
    assert (written["model"], written["output"]) == ("model", "out")
    assert written["calibration"]["text"] == ["cal.txt"]
    with pytest.raises(BadInputError, match="not where it lies"):
        recorded_model(report)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/me/r.yaml:12 rules[1]", "r.yaml:12 rules[1]"),
        ("/mnt/My Disk/r.yaml:3 rules[0]", "r.yaml:3 rules[0]"),
        ("text: [/data/x.txt, '/mnt/a/b.txt']\nmodel: ~/models/foo\n", "text: [x.txt, 'b.txt']\nmodel: foo\n"),
        ("--set calibration.text=/data/t.txt", "--set calibration.text=t.txt"),
        ("file:///srv/me/a.txt", "a.txt"),
        ("../../me/model", "model"),
        ("https://hf.co/org/x", "https://hf.co/org/x"),
        ("models/llama", "models/llama"),
        ("org/name@main", "org/name@main"),
        ("tokens/s and 3 / 4", "tokens/s and 3 / 4"),
    ],
)
def test_of_a_path_its_last_name_is_left(text: str, shown: str) -> None:
    assert without_places({"a": [text]}) == {"a": [shown]}
    assert without_places({"generation": {"text": text}}) == {"generation": {"text": text}}


# Kinds of sources.


def test_only_sources_know_what_kind_they_are() -> None:
    """Outside ``sources/`` nobody asks a source whether it is GGUF; the card reads it from a report."""
    asking = re.compile(r"source\.kind\s*[!=]=|GGUFSource|isinstance\([^)]*SafetensorsFolder")
    outside = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "sources"]
    assert [file.name for file in outside if asking.search(file.read_text())] == []


def test_trust_is_handed_on_by_nobody() -> None:
    """Below commands and verbs ``trust_remote_code`` is a key of the report, and an argument of what is not ours."""
    named = {
        file.relative_to(PACKAGE).as_posix(): len(re.findall(r"trust_remote_code\s*[:=]", file.read_text()))
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "cli" and file.name != "verbs.py"
    }
    assert {name: count for name, count in named.items() if count} == {"upstream.py": 1}
