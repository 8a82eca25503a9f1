"""Publishing, through the real client against a Hub on loopback."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlxq.errors import BadInputError, MlxqError, RecipeError
from mlxq.publish import card
from mlxq.publish.check import Checked, check_folder
from mlxq.publish.publish import Published, publish
from mlxq.recipe.load import load_recipe, recipe_from_dict
from mlxq.recipe.target import Target
from mlxq.retry import Waiting
from mlxq.sources.resolve import resolve
from mlxq.writing.verify import PLOT
from tests.checkpoints import llama
from tests.hub_server import READ_TOKEN, TOKEN, USER, Hub

Command = Callable[..., subprocess.CompletedProcess[str]]
SOURCE_CARD = """\
---
license: apache-2.0
language: [en, fr]
tags: [pytorch, chat]
datasets: [somebody/set]
---
# The original
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model, compared with its original."""
    from mlxq.pipeline import Finished, prepare, run

    folder = tmp_path_factory.mktemp("made")
    source = llama(folder / "original")
    (source / "README.md").write_text(SOURCE_CARD)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    plan = prepare(load_recipe("mixed_4_6"), resolve(str(source)))
    *_, last = run(plan, folder / "tiny-4bit")
    assert isinstance(last, Finished)
    record_comparison(last.out)
    return last.out


def record_comparison(folder: Path) -> None:
    """What ``mlxq compare`` leaves in ``mlxq.json``."""
    report = json.loads((folder / "mlxq.json").read_text())
    report["comparison"] = {
        "name": folder.name,
        "reference": "original",
        "text": {"name": "a text", "sha256": "ab" * 32, "tokens": 2048, "sequence_tokens": 256},
        "noise_floor_kl_mean": 1e-6,
        "notes": ["Faithfulness: fp32."],
        "metrics": {"kl_mean": 0.0123, "kl_mean_se": 0.001, "top1_agreement": 0.961, "ppl": 12.5, "ppl_ratio": 1.021},
        "nan": [],
        "tied_with_reference": False,
        "layer_bits": {"embed_tokens": 4.5, "0": 4.5, "1": 5.1, "lm_head": 6.5},
        "verdict": f"{folder.name} is 3.2x smaller, 96.1% top-1 agreement",
        "kl_histogram": {"edges": [1e-4, 1e-3, 1e-2], "counts": [10, 500, 1500, 38]},
    }
    (folder / "mlxq.json").write_text(json.dumps(report, indent=2) + "\n")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy of the model to do anything to."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def send(folder: Path, repo: str = "org/tiny", *, force: bool = False, **how: Any) -> Published:
    """Publish, and give what came of it."""
    *_, last = publish(check_folder(folder, force=force), Target(repo, **how), force=force)
    assert isinstance(last, Published)
    return last


def local(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def remote(hub: Hub, repo: str = "org/tiny", revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(repo, revision).items() if name != ".gitattributes"}


def front_matter(text: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(text.split("---\n")[1]))


# Sending.


def test_what_is_published_is_what_is_here_and_loads(hub: Hub, model: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download
    from mlx_lm import load

    done = send(model, private=True)
    assert done.created
    assert hub.repos["org/tiny"].private
    assert remote(hub) == local(model)
    report = json.loads((model / "mlxq.json").read_text())
    assert {name: len(content) for name, content in local(model).items() if name != "mlxq.json"} == {
        name: facts["bytes"] for name, facts in report["files"].items()
    }
    fetched = Path(snapshot_download("org/tiny", cache_dir=tmp_path / "cache"))
    check_folder(fetched)
    assert (fetched / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert load(str(fetched))[0] is not None
    assert not [request for request in hub.log if request.storage and request.authorized]


def test_publishing_again_sends_nothing(hub: Hub, model: Path) -> None:
    first = send(model)
    hub.log.clear()
    again = send(model)
    assert not again.sent
    assert not again.created
    assert again.commit == first.commit
    assert {request.method for request in hub.log} <= {"GET", "HEAD"}


def test_only_what_changed_is_sent(hub: Hub, model: Path) -> None:
    send(model)
    report = json.loads((model / "mlxq.json").read_text())
    report["comparison"]["metrics"]["kl_mean"] = 0.02
    (model / "mlxq.json").write_text(json.dumps(report, indent=2) + "\n")
    hub.log.clear()
    assert {change.name for change in send(model).sent} == {"README.md", "mlxq.json"}
    assert not hub.requests("PUT")
    assert "0.0200 ± 0.001" in remote(hub)["README.md"].decode()


def test_large_files_go_in_parts(hub: Hub, model: Path) -> None:
    hub.part_bytes = 50_000
    send(model)
    assert remote(hub) == local(model)
    assert len(hub.requests("PUT", "/4")) == 1


def test_a_branch_and_a_pull_request(hub: Hub, model: Path) -> None:
    hub.add_model("org/tiny", {"notes.txt": b"mine"})
    send(model, revision="four")
    assert set(remote(hub)) == {"notes.txt"}
    assert {**remote(hub, revision="four")} == {**local(model), "notes.txt": b"mine"}
    done = send(model, create_pr=True, message="A first try")
    assert done.pull_request == f"{hub.url}/org/tiny/discussions/1"
    assert set(remote(hub)) == {"notes.txt"}
    assert hub.repos["org/tiny"].messages[-1] == "A first try"
    assert remote(hub, revision="refs/pr/1")["model.safetensors"] == local(model)["model.safetensors"]


def test_a_pull_request_needs_no_right_to_write(hub: Hub, model: Path) -> None:
    hub.create("theirs/tiny")
    with pytest.raises(BadInputError, match="may not write"):
        send(model, "theirs/tiny")
    assert send(model, "theirs/tiny", create_pr=True).pull_request


def test_weights_of_an_earlier_upload_go_away_and_other_files_stay(hub: Hub, model: Path) -> None:
    send(model)
    earlier = {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"mine", "model.gguf": b"other"}
    hub.add_model("org/tiny", earlier)
    done = send(model)
    assert [(c.name, c.change) for c in done.sent] == [("model-00001-of-00002.safetensors", "removed")]
    assert remote(hub) == {**local(model), "notes.txt": b"mine", "model.gguf": b"other"}


def test_a_collection_takes_it_once(hub: Hub, model: Path) -> None:
    hub.collections["org/mine-0123"] = []
    send(model, collection="org/mine-0123")
    send(model, collection="org/mine-0123")
    assert hub.collections == {"org/mine-0123": ["org/tiny"]}
    with pytest.raises(BadInputError, match="is published, but was not added to collection org/other-1"):
        send(model, collection="org/other-1")


def test_files_that_mlxq_did_not_write_stay_here(hub: Hub, model: Path) -> None:
    (model / ".env").write_text("secret")
    assert check_folder(model).left_out == (".env",)
    send(model)
    assert ".env" not in remote(hub)


# Refusing.


def spoil_bytes(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def add_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-extra.safetensors")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_bytes, "model.safetensors is not what was written"),
        (remove_tokenizer, "tokenizer.json is missing"),
        (add_weights, "model-extra.safetensors holds weights that mlxq did not write"),
    ],
)
def test_a_spoilt_folder_is_refused_and_no_repository_made(
    hub: Hub, model: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(model)
    with pytest.raises(BadInputError, match=said):
        check_folder(model)
    assert not hub.log
    assert said in check_folder(model, force=True).problems[0]


def test_a_spoilt_folder_is_published_by_force(hub: Hub, model: Path) -> None:
    spoil_bytes(model)
    send(model, force=True)
    assert remote(hub)["model.safetensors"] == local(model)["model.safetensors"]


def test_a_folder_that_does_not_load_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    report = json.loads((model / "mlxq.json").read_text())
    report["files"]["config.json"] = card.file_facts((model / "config.json").read_bytes())
    (model / "mlxq.json").write_text(json.dumps(report))
    with pytest.raises(BadInputError, match="does not load"):
        check_folder(model)


def test_what_is_no_finished_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in ("out.partial", "out"):
        with pytest.raises(BadInputError) as caught:
            check_folder(tmp_path / name)
        assert "run the command that made it again" in (caught.value.hint or "")
    with pytest.raises(BadInputError, match="no finished model"):
        check_folder(tmp_path)


def test_what_the_hub_holds_is_not_overwritten_by_mistake(hub: Hub, model: Path) -> None:
    hub.add_model("org/original", {"model.safetensors": b"theirs"})
    with pytest.raises(BadInputError, match="holds weights that mlxq did not write"):
        send(model, "org/original")
    hub.create("org/public")
    with pytest.raises(BadInputError, match="is public, and --private was asked for"):
        send(model, "org/public", private=True)
    with pytest.raises(BadInputError, match="to open a pull request on"):
        send(model, "org/none", create_pr=True)
    assert not hub.requests("POST")
    assert "org/none" not in hub.repos


@pytest.mark.parametrize(
    ("token", "said"),
    [(READ_TOKEN, "may not write"), ("hf_unknownTokenOfNobody", "does not accept your login")],
)
def test_no_rights(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, token: str, said: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BadInputError, match=said) as caught:
        send(model)
    assert token not in f"{caught.value.message}{caught.value.hint}"
    assert not hub.repos


def test_no_login(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(BadInputError, match="publishing needs"):
        send(model)
    assert not hub.log


@pytest.mark.parametrize("repo", ["tiny", "org/", "org/a/b", "org/a--b", "org/.git", "https://hf.co/org/a"])
def test_names_that_no_repository_has(repo: str, hub: Hub, mlxq: Command) -> None:
    from mlxq.publish.check import check_target

    with pytest.raises(BadInputError, match="is no repository"):
        check_target(Target(repo))


# The card.


def test_the_card_says_what_it_is(model: Path, hub: Hub) -> None:
    send(model)
    text = remote(hub)["README.md"].decode()
    assert front_matter(text) == {
        "library_name": "mlx",
        "license": "apache-2.0",
        "language": ["en", "fr"],
        "tags": ["mlx", "conversational", "chat"],
        "pipeline_tag": "text-generation",
    }
    for expected in (
        "# tiny\n",
        "mlx_lm.generate --model org/tiny ",
        'load("org/tiny")',
        "lms get https://huggingface.co/org/tiny",
        "| `model.layers.{0-1}.self_attn.q_proj` | 4 bits, groups of 64 | 4.50 |",
        "| `lm_head` | 6 bits, groups of 64 | 6.50 |",
        "default: {bits: 4, group_size: 64}",
        "It is 3.2x smaller, 96.1% top-1 agreement.",
        "| 0.0123 ± 0.001 |",
        "| +2.10% |",
        f"]({PLOT})",
        "hf download org/tiny mlxq.json --local-dir . && mlxq quantize --locked mlxq.json",
    ):
        assert expected in text
    assert str(model.parent) not in text
    assert remote(hub)[PLOT].startswith(b"\x89PNG")


def test_a_known_source_is_named(model: Path) -> None:
    report = json.loads((model / "mlxq.json").read_text())
    report["source"] |= {"base_model": "meta/original", "revision": "a" * 40}
    text = card.render(card.make_card(report, "org/tiny", model))
    assert front_matter(text)["base_model"] == "meta/original"
    assert front_matter(text)["base_model_relation"] == "quantized"
    assert f"of commit `{'a' * 40}`" in text
    report["modules"][1]["method"] = "gptq"
    report["recipe"]["resolved"]["method"] = "gptq"
    text = card.render(card.make_card(report, "org/tiny", model))
    assert "| `model.layers.0.self_attn.q_proj` | 4 bits, groups of 64, by gptq |" in text
    assert "\nmethod: gptq\n" in text
    assert "--model" not in text.partition("## Make it again")[2]


def edit(text: str) -> str:
    """What a person does to a card: a key of their own, a licence, words before and after."""
    text = text.replace("license: apache-2.0\n", "license: mit  # mine\nthumbnail: x.png\n")
    return text.replace(card.BEGIN, f"My foreword.\n\n{card.BEGIN}") + "\nMy afterword.\n"


def holds_the_edits(text: str) -> bool:
    words = ("license: mit  # mine\nthumbnail: x.png\n", "\nMy foreword.\n", "\nMy afterword.\n")
    return all(word in text for word in words) and text.count(card.BEGIN) == 1


@pytest.mark.parametrize("where", ["before", "here", "hub"])
def test_a_persons_edits_survive(where: str, hub: Hub, model: Path) -> None:
    if where != "before":
        send(model)
    if where == "hub":
        hub.add_model("org/tiny", {"README.md": edit(remote(hub)["README.md"].decode()).encode()})
    else:
        (model / "README.md").write_text(edit((model / "README.md").read_text()))
    for measured in (0.02, 0.03):
        report = json.loads((model / "mlxq.json").read_text())
        report["comparison"]["metrics"]["kl_mean"] = measured
        (model / "mlxq.json").write_text(json.dumps(report, indent=2) + "\n")
        send(model)
        text = remote(hub)["README.md"].decode()
        assert holds_the_edits(text)
        assert f"{measured:.4f}" in text
        assert (model / "README.md").read_text() == text


def test_edits_that_went_to_a_pull_request_go_to_main_as_well(hub: Hub, model: Path) -> None:
    send(model)
    (model / "README.md").write_text(edit((model / "README.md").read_text()))
    send(model, create_pr=True)
    assert not holds_the_edits(remote(hub)["README.md"].decode())
    send(model)
    assert holds_the_edits(remote(hub)["README.md"].decode())


def test_edits_in_two_places_are_for_a_person_to_settle(hub: Hub, model: Path) -> None:
    send(model)
    hub.add_model("org/tiny", {"README.md": remote(hub)["README.md"] + b"\nWritten there.\n"})
    (model / "README.md").write_text((model / "README.md").read_text() + "\nWritten here.\n")
    with pytest.raises(BadInputError, match="edited in two places"):
        send(model)
    send(model, force=True)
    assert remote(hub)["README.md"].endswith(b"\nWritten here.\n")


def test_a_card_without_marks_is_added_to(hub: Hub, model: Path) -> None:
    hub.add_model("org/tiny", {"README.md": b"---\r\nlicense: mit\r\ntags: [mine]\r\n---\r\n# Mine\r\n"})
    send(model)
    text = remote(hub)["README.md"].decode()
    assert front_matter(text)["license"] == "mit"
    assert front_matter(text)["tags"] == ["mine", "mlx", "conversational", "chat"]
    assert text.index("# Mine") < text.index(card.BEGIN)
    assert not send(model).sent


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"# A\n{card.END}\n{card.BEGIN}\n", "do not pair up"),
        (f"# A\n{card.BEGIN}\n", "do not pair up"),
        ("---\nlicense: [mit\n---\n# A\n", "README.md:"),
        ("---\n- a list\n---\n# A\n", "no mapping"),
    ],
)
def test_a_card_that_cannot_be_read_is_said_so(hub: Hub, model: Path, text: str, said: str) -> None:
    (model / "README.md").write_text(text)
    with pytest.raises(BadInputError, match=said):
        send(model)
    assert not hub.repos


# Faults on the way.


def test_too_many_requests_are_waited_for(hub: Hub, model: Path) -> None:
    for method, path in (("GET", "/api/models/org/tiny"), ("POST", "/repos/create"), ("POST", "/commit/")):
        hub.fail(method, path, status=429, headers={"Retry-After": "0"})
    events = list(publish(check_folder(model), Target("org/tiny")))
    assert [e.reason for e in events if isinstance(e, Waiting)] == ["the Hub limits how often it may be asked"] * 3
    assert remote(hub) == local(model)


def test_trouble_of_the_hub_is_an_error_that_says_so(hub: Hub, model: Path) -> None:
    hub.fail("GET", "/api/models/org/tiny", status=429, headers={"Retry-After": "5000"})
    with pytest.raises(MlxqError, match="limits how often"):
        send(model)
    hub.add_model("org/tiny", {"notes.txt": b""})
    hub.fail("POST", "/commit/", status=503, times=1)
    with pytest.raises(MlxqError, match="answered 503"):
        send(model, create_pr=True)
    hub.fail("POST", "/commit/", status=503, times=1)
    assert send(model).sent


def test_a_broken_upload_continues(hub: Hub, model: Path) -> None:
    """The weights arrive, the commit does not: the second run sends no weights."""
    hub.create("org/tiny")
    hub.fail("POST", "/commit/", drop_after=100)
    with pytest.raises(MlxqError, match="connection to the Hub broke") as caught:
        send(model, create_pr=True)
    assert "again" in (caught.value.hint or "")
    before = local(model)
    hub.log.clear()
    send(model)
    assert remote(hub) == local(model)
    assert not hub.requests("PUT")
    assert before["model.safetensors"] == local(model)["model.safetensors"]


def test_the_hub_changing_meanwhile_is_noticed(hub: Hub, model: Path) -> None:
    hub.create("org/tiny")
    hub.fail("POST", "/commit/", status=412)
    with pytest.raises(MlxqError, match="changed by somebody else"):
        send(model)


def dropped_run(checked: Checked, repo: str) -> None:
    """Publish until it is done; a run that does not get there ends with a clear error."""
    said: list[str] = []
    while len(said) < 30:
        try:
            *_, last = publish(checked, Target(repo))
        except MlxqError as error:
            said.append(error.message)
        else:
            assert isinstance(last, Published)
            assert all("connection to the Hub broke" in message for message in said)
            return
    raise AssertionError(f"{repo} was never published")


def give_own_weights(folder: Path, number: int) -> None:
    """Change the last bytes of the weights, so that no run finds another's on the Hub."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + number.to_bytes(4, "little"))
    report = json.loads((folder / "mlxq.json").read_text())
    report["files"][weights.name] = card.file_facts(weights.read_bytes())
    (folder / "mlxq.json").write_text(json.dumps(report, indent=2) + "\n")


def run_with_drops(hub: Hub, made: Path, tmp_path: Path, runs: int) -> None:
    hub.part_bytes, hub.random = 60_000, random.Random(7)
    folders = [Path(shutil.copytree(made, tmp_path / f"copy-{number}")) for number in range(runs)]
    for number, folder in enumerate(folders):
        give_own_weights(folder, number)
    checked = [check_folder(folder) for folder in folders]
    hub.drop_rate = 0.08
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda pair: dropped_run(pair[1], f"org/m{pair[0]}"), enumerate(checked)))
    for number, folder in enumerate(folders):
        assert remote(hub, f"org/m{number}") == local(folder)
    assert len([request for request in hub.log if request.dropped]) > runs / 2


def test_random_drops_end_whole_and_identical(hub: Hub, made: Path, tmp_path: Path) -> None:
    run_with_drops(hub, made, tmp_path, 20)


@pytest.mark.slow
def test_many_random_drops_end_whole_and_identical(hub: Hub, made: Path, tmp_path: Path) -> None:
    run_with_drops(hub, made, tmp_path, 200)


# The command.


def test_a_dry_run_shows_all_and_changes_nothing(hub: Hub, model: Path, mlxq: Command) -> None:
    before = local(model)
    shown = mlxq("upload", str(model), "org/tiny", "--dry-run")
    assert shown.returncode == 0
    assert "model.safetensors" in shown.stdout
    assert card.BEGIN in shown.stdout
    data = json.loads(mlxq("upload", str(model), "org/tiny", "--dry-run", "--json").stdout)
    assert {file["change"] for file in data["files"]} == {"new"}
    assert not data["exists"]
    assert not hub.repos
    assert local(model) == before
    send(model)
    hub.add_model("org/tiny", {"config.json": b"{}", "model-00009-of-00009.safetensors": b""})
    data = json.loads(mlxq("upload", str(model), "org/tiny", "--dry-run", "--json").stdout)
    changes = {file["name"]: file["change"] for file in data["files"]}
    assert changes.pop("config.json") == "changed"
    assert changes.pop("model-00009-of-00009.safetensors") == "removed"
    assert set(changes.values()) == {"unchanged"}
    assert not hub.requests("PUT", "/commit/")


def test_the_command_publishes_and_then_says_that_nothing_changed(hub: Hub, model: Path, mlxq: Command) -> None:
    done = mlxq("upload", str(model), "org/tiny", "--json")
    assert json.loads(done.stdout)["url"] == f"{hub.url}/org/tiny"
    again = mlxq("upload", str(model), "org/tiny")
    assert again.stdout == f"{hub.url}/org/tiny\n"
    assert "nothing changed" in again.stderr


def test_the_token_is_nowhere(hub: Hub, model: Path, mlxq: Command, tmp_path: Path) -> None:
    said = []
    for arguments, debug in (
        (("upload", str(model), "org/tiny", "--dry-run"), "MLXQ_DEBUG"),
        (("upload", str(model), "org/tiny"), "HF_DEBUG"),
        (("upload", str(model), "theirs/tiny"), "MLXQ_DEBUG"),
        (("env", "--json"), "MLXQ_DEBUG"),
    ):
        done = mlxq(*arguments, **{debug: "1"})
        said.append(done.stdout + done.stderr)
    wrong = mlxq("upload", str(model), "org/tiny", MLXQ_DEBUG="1", HF_TOKEN="hf_wrongTokenToHide99")
    assert "does not accept your login" in wrong.stderr
    said.append(wrong.stdout + wrong.stderr)
    kept = [content.decode("latin-1") for content in (*local(model).values(), *remote(hub).values())]
    for text in (*said, *kept):
        assert TOKEN not in text
        assert "hf_wrongTokenToHide99" not in text
    assert [request for request in hub.log if request.authorized]


# From a recipe.


def write_recipe(folder: Path, gate: str) -> Path:
    source = llama(folder / "original", hidden_size=64, num_hidden_layers=1)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {source}\ndefault: {{bits: 4}}\ngates: ['{gate}']\nupload: {{repo: {USER}/made, private: true}}\n"
    )
    return recipe


def test_a_recipe_publishes_once_its_gates_passed(hub: Hub, tmp_path: Path, mlxq: Command) -> None:
    recipe, out = write_recipe(tmp_path, "kl_mean<5"), tmp_path / "out"
    done = mlxq("quantize", str(recipe), "-o", str(out), "--no-generate", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schema"] == "mlxq.report"
    assert remote(hub, f"{USER}/made") == local(out)
    assert hub.repos[f"{USER}/made"].private
    assert "kl_mean" in (out / "mlxq.json").read_text()
    report = json.loads((out / "mlxq.json").read_text())
    assert recipe_from_dict(report["recipe"]["resolved"], "again").upload is None


def test_a_failed_gate_publishes_nothing(hub: Hub, tmp_path: Path, mlxq: Command) -> None:
    recipe = write_recipe(tmp_path, "kl_mean<1e-12")
    done = mlxq("quantize", str(recipe), "-o", str(tmp_path / "out"), "--no-generate")
    assert done.returncode == 3
    assert not hub.log
    done = mlxq("quantize", str(recipe), "-o", str(tmp_path / "other"), HF_TOKEN="")
    assert done.returncode == 2
    assert "publishing needs" in done.stderr
    assert not (tmp_path / "other").exists()


def test_faults_of_the_upload_key_are_said_with_their_lines(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("default: {bits: 4}\nupload:\n  repo: made\n  revison: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert "r.yaml:3: upload.repo: 'made' is no repository" in "\n".join(caught.value.faults)
    assert "r.yaml:4: upload.revison: unknown key; did you mean 'revision'?" in "\n".join(caught.value.faults)
    recipe.write_text("upload:\n  repo: org/made\n  revision: x\n  create_pr: true\n")
    with pytest.raises(RecipeError, match="always against main"):
        load_recipe(recipe)
