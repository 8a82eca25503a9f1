"""A model in several GGUF files is one model, whichever of them is named, here and on the Hub."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from mlxq.errors import BadInputError
from mlxq.pipeline import Finished, default_output, prepare, run
from mlxq.recipe.load import load_recipe
from mlxq.sources import hub_files
from mlxq.sources.gguf import GGUFSource, open_gguf
from mlxq.sources.gguf_parts import model_name, parts_of
from mlxq.sources.resolve import resolve
from tests.hub_server import Hub
from tests.test_gguf import HEAD_DIM, hf_weights, read_all, write_gguf
from tests.test_hub import fetched_weights, hashes

Command = Callable[..., subprocess.CompletedProcess[str]]
TYPES = {name: T.Q8_0 for name, weight in hf_weights("llama").items() if weight.ndim > 1}


def split(folder: Path, stem: str = "m", **how: object) -> list[Path]:
    """A model of 21 tensors in parts of eight."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / f"{stem}.gguf", types=TYPES, per_part=8, **how)  # type: ignore[arg-type]
    return sorted(folder.glob(f"{stem}-*.gguf"))


def test_names_of_parts() -> None:
    parts = ("q/m-00001-of-00003.gguf", "q/m-00002-of-00003.gguf", "q/m-00003-of-00003.gguf")
    assert all(parts_of(part) == parts for part in parts)
    for whole in ("m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-1-of-3.gguf", "m-00001-of-00003.bin"):
        assert parts_of(whole) == (whole,)
    assert [model_name(name) for name in ("m-00002-of-00003.gguf", "m.gguf")] == ["m", "m"]


def test_any_part_is_the_model(tmp_path: Path) -> None:
    whole = open_gguf(write_gguf(tmp_path / "whole.gguf", types=TYPES), "whole")
    parts = split(tmp_path / "parts")
    assert len(parts) == 3
    for named in (*parts, tmp_path / "parts"):
        source = resolve(str(named))
        assert isinstance(source, GGUFSource)
        assert source.weight_files == tuple(parts)
        assert source.config == whole.config
        assert source.sidecars == whole.sidecars
        assert source.tensors == whole.tensors
        assert source.stored_bytes == whole.stored_bytes
    assert {source.file_of(name) for name in source.tensors} == set(parts)
    for name in whole.tensors:
        np.testing.assert_array_equal(read_all(source, name), read_all(whole, name))
        if whole.repack_format(name):
            ours, theirs = (each.read_repacked(name, 0, 8) for each in (source, whole))
            assert all(np.array_equal(ours[part], theirs[part]) for part in theirs)
    assert default_output(load_recipe("4bit"), str(parts[1])) == Path("m-4bit")


def test_what_is_no_whole_set_is_refused(tmp_path: Path) -> None:
    parts = split(tmp_path)
    first, second, third = (part.read_bytes() for part in parts)

    def refused(said: str, named: Path = parts[0]) -> None:
        with pytest.raises(BadInputError) as caught:
            resolve(str(named))
        assert said in caught.value.message
        assert "\n" not in caught.value.message
        assert caught.value.hint

    parts[1].unlink()
    refused("m-00001-of-00003.gguf is one of 3 parts, and m-00002-of-00003.gguf is missing")
    refused("m-00002-of-00003.gguf is missing", tmp_path)
    parts[1].write_bytes(third)
    refused("m-00002-of-00003.gguf says that it is part 3, and its name says 2")
    parts[1].write_bytes(write_gguf(tmp_path / "other.gguf").read_bytes())
    refused("says that it is one of 1 parts, and its name says 3")
    parts[1].write_bytes(second[:-1000])
    refused("cut short", parts[2])
    renamed = tmp_path / "elsewhere" / "renamed.gguf"
    renamed.parent.mkdir()
    renamed.write_bytes(first)
    refused("is one of 3 parts, and its name does not say which", renamed)

    edited = tmp_path / "edited"
    parts = split(edited)
    held = sum(len(gguf.GGUFReader(part).tensors) for part in parts)
    at = parts[0].read_bytes().index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    raw = parts[0].read_bytes()
    assert int.from_bytes(raw[at : at + 4], "little") == held
    parts[0].write_bytes(raw[:at] + (held + 1).to_bytes(4, "little") + raw[at + 4 :])
    refused(f"hold {held} tensors, and should hold {held + 1}", edited)
    # A part of the same place in a file of other tensors: the same name twice.
    parts[0].write_bytes(raw)
    number = b"split.no" + (2).to_bytes(4, "little")
    parts[1].write_bytes(first.replace(number + b"\0\0", number + b"\1\0"))
    refused("is in more than one part", edited)


def test_a_folder_with_several_models_names_them(tmp_path: Path) -> None:
    split(tmp_path)
    write_gguf(tmp_path / "other.gguf")
    with pytest.raises(BadInputError) as caught:
        resolve(str(tmp_path))
    assert "name one" in (caught.value.hint or "")


def on_the_hub(hub: Hub, parts: list[Path], repo: str = "org/split", folder: str = "q8/") -> None:
    hub.add_model(repo, {f"{folder}{part.name}": part.read_bytes() for part in parts})


@pytest.mark.parametrize("low_disk", [False, True])
def test_parts_on_the_hub_are_one_model(hub: Hub, tmp_path: Path, low_disk: bool) -> None:
    parts = split(tmp_path / "here")
    # Whatever was fetched stays in the cache.
    repo = f"org/split-{low_disk}"
    on_the_hub(hub, parts, repo)
    *_, _ = run(prepare(load_recipe("4bit"), resolve(str(parts[0]))), tmp_path / "same")
    plan = prepare(load_recipe("4bit"), resolve(repo))
    assert plan.source.remote is not None
    assert [file.name for file in plan.source.remote.weights] == [f"q8/{part.name}" for part in parts]
    assert not fetched_weights(hub)
    *_, last = run(plan, tmp_path / "out", low_disk=low_disk)
    assert isinstance(last, Finished)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "same")
    assert len(fetched_weights(hub)) == 3


def test_any_part_on_the_hub_names_it_and_a_missing_one_is_said(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    parts = split(tmp_path / "here")
    on_the_hub(hub, parts)
    done = mlxq("inspect", f"org/split/q8/{parts[2].name}")
    assert done.returncode == 0, done.stderr
    on_the_hub(hub, parts[:2], "org/lacking")
    lacking = mlxq("inspect", "org/lacking")
    assert lacking.returncode == 2
    assert f"of 3 parts it does not hold q8/{parts[2].name}" in lacking.stderr
    hub.add_model("org/split", {"whole.gguf": b"x" * 200})
    several = mlxq("inspect", "org/split")
    assert "holds 2 GGUF models: name one" in several.stderr
    assert f"org/split/q8/{parts[0].name} (3 parts, 0.0 GB)" in " ".join(several.stderr.split())


def test_rope_frequencies_are_read_with_the_header(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide the config, and are weights: of a model on the Hub they are fetched alone."""
    from mlxq.sources.gguf_names import llama3_factors

    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = np.array(llama3_factors(scaling, 50000.0, HEAD_DIM), np.float32)
    file = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    hub.add_model("org/a", {"m.gguf": file.read_bytes()})
    monkeypatch.setattr(hub_files, "_FIRST_GGUF_BYTES", 256)
    found = resolve("org/a")
    assert found.remote is not None
    assert found.config == open_gguf(file, "m").config
    assert found.config["rope_scaling"]["factor"] == 8.0
