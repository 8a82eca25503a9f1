"""The loopback Hub against the real client: what other tests stand on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hub_server import READ_TOKEN, TOKEN, Hub


def folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub" / "notes.txt").write_text("notes")
    (path / "README.md").write_text("---\ntags: [a]\n---\n# Card\n")
    (path / "model.safetensors").write_bytes(os.urandom(200_000))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in path.rglob("*")
        if p.is_file() and ".cache" not in p.parts
    }


@pytest.mark.parametrize("part_bytes", [5_000_000, 64_000])
def test_what_is_uploaded_comes_back(hub: Hub, tmp_path: Path, part_bytes: int) -> None:
    from huggingface_hub import HfApi, snapshot_download

    hub.part_bytes, hub.page_size = part_bytes, 2
    source = folder(tmp_path / "source")
    api = HfApi()
    api.create_repo("org/a", private=True, exist_ok=True)
    assert hub.repos["org/a"].private
    api.upload_folder(repo_id="org/a", folder_path=source)
    info = api.model_info("org/a", files_metadata=True)
    assert info.tags == ["a"]
    assert {s.rfilename: s.size for s in info.siblings or ()}["model.safetensors"] == 200_000
    paths = {entry.path for entry in api.list_repo_tree("org/a", recursive=True)}
    assert paths == {*contents(source), "sub", ".gitattributes"}
    fetched = Path(snapshot_download("org/a", local_dir=tmp_path / "fetched"))
    assert {**contents(source), ".gitattributes": hub.files("org/a")[".gitattributes"]} == contents(fetched)
    assert len(hub.requests("PUT")) == (1 if part_bytes > 200_000 else 4)
    assert not [r for r in hub.log if r.storage and r.authorized]


def test_a_second_upload_sends_nothing(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    source = folder(tmp_path / "source")
    hub.add_model("org/a", source)
    HfApi().upload_folder(repo_id="org/a", folder_path=source)
    assert not hub.requests("PUT")
    assert not hub.requests("POST", "/commit/")


def test_ranges_are_served_and_dropped_connections_resumed(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url

    content = os.urandom(300_000)
    commit = hub.add_model("org/a", {"model.safetensors": content})
    url = hf_hub_url("org/a", "model.safetensors")
    for header, expected in (
        ("bytes=10-19", content[10:20]),
        ("bytes=-7", content[-7:]),
        ("bytes=299990-", content[-10:]),
    ):
        answer = get_session().get(url, headers={"Range": header, "Authorization": f"Bearer {TOKEN}"})
        assert answer.content == expected
        assert answer.status_code == 206
    hub.fail("GET", "/blobs/", drop_after=100_000)
    fetched = Path(hf_hub_download("org/a", "model.safetensors", revision=commit, cache_dir=tmp_path))
    assert fetched.read_bytes() == content
    assert not [r for r in hub.log if r.storage and r.authorized]


def test_refusals_are_the_clients_own_errors(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    hub.add_model("org/a", {"config.json": b"{}"})
    hub.add_model("org/gated", {"config.json": b"{}"}, gated="manual")
    api = HfApi()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/b")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/a", revision="nope")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(GatedRepoError):
        hf_hub_download("org/gated", "config.json", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("org/c")


def test_branches_pull_requests_and_collections(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    source = folder(tmp_path / "source")
    hub.create("org/a")
    hub.collections["org/mine-1"] = []
    api = HfApi()
    api.create_branch("org/a", branch="quantized")
    api.upload_folder(repo_id="org/a", folder_path=source, revision="quantized")
    commit = api.upload_folder(repo_id="org/a", folder_path=source, create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert set(hub.files("org/a")) == {".gitattributes"}
    assert hub.files("org/a", "quantized") == hub.files("org/a", "refs/pr/1")
    api.add_collection_item("org/mine-1", "org/a", "model")
    assert hub.collections == {"org/mine-1": ["org/a"]}
    api.delete_repo("org/a")
    assert not hub.repos
