"""What is not mlxq's stays: other people's folders, the source under any name, the old model until a new one stands."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxq.errors import BadInputError, MlxqError
from mlxq.pipeline import Finished, Resumed, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import load_recipe
from mlxq.sources.resolve import resolve
from mlxq.writing.execute import Written
from mlxq.writing.folder import PartialFolder
from mlxq.writing.journal import NAME as JOURNAL
from tests.checkpoints import llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "project" / "model", shards=2)


@pytest.fixture
def plan(model: Path) -> Plan:
    return plan_of(model)


def plan_of(model: Path, recipe: str = "4bit") -> Plan:
    return prepare(load_recipe(recipe), resolve(str(model)))


def make(plan: Plan, out: Path, *, force: bool = False) -> Finished:
    *_, last = run(plan, out, force=force)
    assert isinstance(last, Finished)
    return last


def stop_early(plan: Plan, out: Path, *, force: bool = False) -> None:
    """Run until the first tensor is finished."""
    events = run(plan, out, force=force)
    next(event for event in events if isinstance(event, Written) and event.finished)
    events.close()


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: files by their bytes, links by where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def mine(folder: Path) -> None:
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "a.jpg").write_text("mine")


def a_diary(folder: Path) -> None:
    folder.mkdir()
    (folder / JOURNAL).write_text('{"today": "rain"}\n')


def a_file(folder: Path) -> None:
    folder.write_text("mine")


def a_linked_folder(folder: Path) -> None:
    mine(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))


def a_link_to_nothing(folder: Path) -> None:
    folder.symlink_to(folder.with_name("nothing"))


def a_journal_among_other_things(folder: Path) -> None:
    mine(folder)
    (folder / JOURNAL).write_text('{"plan": "ab"}\n')


def a_linked_journal(folder: Path) -> None:
    folder.mkdir()
    folder.with_name("theirs").write_text('{"plan": "ab"}\n')
    (folder / JOURNAL).symlink_to(folder.with_name("theirs"))


def a_linked_model(folder: Path) -> None:
    folder.mkdir()
    (folder / JOURNAL).write_text('{"plan": "ab"}\n')
    mine(folder.with_name("elsewhere"))
    (folder / "model").symlink_to(folder.with_name("elsewhere"))


def something_in_the_model(folder: Path) -> None:
    mine(folder / "model")
    (folder / JOURNAL).write_text('{"plan": "ab"}\n')


def a_model(folder: Path) -> None:
    llama(folder)


@pytest.mark.parametrize(
    "put",
    [
        mine,
        a_diary,
        a_file,
        a_linked_folder,
        a_link_to_nothing,
        a_journal_among_other_things,
        a_linked_journal,
        a_linked_model,
        something_in_the_model,
        a_model,
    ],
)
def test_somebody_elses_partial_folder_is_left_alone(plan: Plan, tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "out.partial")
    before = tree(tmp_path)
    for force in (False, True):
        with pytest.raises(BadInputError, match=r"out\.partial"):
            make(plan, tmp_path / "out", force=force)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("journal", [None, b"", bytes(64), b"{broken"])
def test_an_empty_folder_and_one_with_a_spoilt_journal_of_ours_are_used(
    plan: Plan, tmp_path: Path, journal: bytes | None
) -> None:
    if journal == b"{broken":
        stop_early(plan, tmp_path / "out")
    (tmp_path / "out.partial").mkdir(exist_ok=True)
    if journal is not None:
        (tmp_path / "out.partial" / JOURNAL).write_bytes(journal)
    first, *_ = run(plan, tmp_path / "out")
    assert isinstance(first, Resumed) == (journal == b"{broken")
    if isinstance(first, Resumed):
        assert first.discarded == "a journal that cannot be relied on"
    assert (tmp_path / "out" / "mlxq.json").is_file()
    assert not (tmp_path / "out.partial").exists()


def test_a_source_called_out_partial_survives(tmp_path: Path) -> None:
    source = llama(tmp_path / "out.partial")
    before = tree(tmp_path)
    with pytest.raises(BadInputError, match="holds the model"):
        make(plan_of(source), tmp_path / "out")
    assert tree(tmp_path) == before


def an_app(folder: Path) -> None:
    mine(folder)
    (folder / "config.json").write_text("{}")


def a_config_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def a_model_and_notes(folder: Path) -> None:
    llama(folder)
    (folder / "thesis.txt").write_text("mine")


def a_model_and_a_folder(folder: Path) -> None:
    llama(folder)
    mine(folder)


def another_programs_report(folder: Path) -> None:
    folder.mkdir()
    (folder / "mlxq.json").write_text("{}")
    (folder / "data.csv").write_text("mine")


@pytest.mark.parametrize(
    "put", [an_app, a_config_alone, a_model_and_notes, a_model_and_a_folder, another_programs_report, a_file]
)
def test_force_replaces_nothing_but_a_model(plan: Plan, tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(BadInputError, match="already exists"):
        make(plan, tmp_path / "out")
    with pytest.raises(BadInputError, match="force replaces nothing else"):
        make(plan, tmp_path / "out", force=True)
    assert tree(tmp_path) == before


def test_force_replaces_a_model_of_any_maker_and_an_empty_folder(plan: Plan, tmp_path: Path) -> None:
    llama(tmp_path / "theirs")
    templates = tmp_path / "theirs" / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("{{ messages }}")
    (tmp_path / "empty").mkdir()
    make(plan, tmp_path / "ours")
    for name in ("theirs", "empty", "ours"):
        make(plan, tmp_path / name, force=True)
        assert (tmp_path / name / "mlxq.json").is_file()
        assert sorted(path.name for path in tmp_path.glob(f"{name}*")) == [name]


def test_what_is_put_into_the_old_model_while_the_new_one_is_written_stays(plan: Plan, tmp_path: Path) -> None:
    make(plan, tmp_path / "out")
    events = run(plan, tmp_path / "out", force=True)
    next(event for event in events if isinstance(event, Written) and event.finished)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match=r"thesis\.txt"):
        list(events)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_an_output_that_comes_to_be_meanwhile_is_not_replaced(plan: Plan, tmp_path: Path) -> None:
    events = run(plan, tmp_path / "out")
    next(event for event in events if isinstance(event, Written) and event.finished)
    shutil.copytree(plan.source.weight_files[0].parent, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(BadInputError, match="already exists"):
        list(events)
    assert tree(tmp_path / "out") == before


def linked_weights(model: Path, out: Path) -> None:
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).symlink_to(file)


def hard_links(model: Path, out: Path) -> None:
    shutil.copytree(model, out, copy_function=os.link)


def a_linked_parent(model: Path, out: Path) -> None:
    out.symlink_to(model)


@pytest.mark.parametrize("name_anew", [linked_weights, hard_links, a_linked_parent])
def test_the_source_under_another_name_is_still_the_source(
    plan: Plan, model: Path, tmp_path: Path, name_anew: Callable[[Path, Path], None]
) -> None:
    name_anew(model, tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(BadInputError, match="holds the model"):
        make(plan, tmp_path / "out", force=True)
    # And the other way round; links that lead out of a folder are no weights of a source.
    if name_anew is a_linked_parent:
        with pytest.raises(BadInputError, match="holds the model"):
            make(plan_of(tmp_path / "out"), model, force=True)
    assert tree(tmp_path) == before


def test_force_never_takes_the_source_with_it(plan: Plan, model: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    (tmp_path / "linked").symlink_to(model.parent)
    for out, said in [
        (model, "holds the model"),
        (model.parent, "holds the model"),
        (tmp_path / "linked" / "model", "holds the model"),
        (tmp_path / "linked" / "..", "no name"),
        (Path("."), "no name"),
    ]:
        with pytest.raises(BadInputError, match=said):
            make(plan, out, force=True)
    (tmp_path / "linked").unlink()
    assert tree(tmp_path) == before


def test_the_old_model_stands_until_the_new_one_does(
    plan: Plan, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, old = tmp_path / "out", tmp_path / "out.replaced"
    make(plan, out)
    before = tree(out)
    other = plan_of(model, "8bit")
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.parent.name == "out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return rename(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fail_for_the_new)
        with pytest.raises(MlxqError, match="cannot write"):
            make(other, out, force=True)
    assert tree(old) == before, "between the two renames it has another name"
    make(other, out)
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 8
    assert not old.exists()


def test_a_folder_called_out_replaced_is_left_alone(plan: Plan, tmp_path: Path) -> None:
    make(plan, tmp_path / "out")
    mine(tmp_path / "out.replaced")
    before = tree(tmp_path)
    with pytest.raises(BadInputError, match=r"out\.replaced is in the way"):
        make(plan, tmp_path / "out", force=True)
    assert tree(tmp_path / "out") | tree(tmp_path / "out.replaced") == {
        name.partition("/")[2]: content for name, content in before.items() if name.startswith("out")
    }


def test_of_two_runs_at_once_one_says_that_the_other_writes(plan: Plan, tmp_path: Path) -> None:
    with PartialFolder(plan, tmp_path / "out"), pytest.raises(BadInputError, match="another run is writing"):
        PartialFolder(plan, tmp_path / "out")


def test_a_run_that_opened_the_lock_of_one_that_ended_does_not_touch_its_model(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run has the journal open when the first one ends, and gets the lock of a file that is gone."""
    first = run(plan, tmp_path / "out")
    next(event for event in first if isinstance(event, Written) and event.finished)
    flock = fcntl.flock

    def after_the_first_ends(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        list(first)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", after_the_first_ends)
    with pytest.raises(BadInputError, match="already exists"):
        PartialFolder(plan, tmp_path / "out")
    assert (tmp_path / "out" / "mlxq.json").is_file()
    assert not (tmp_path / "out.partial").exists()


def test_a_file_system_without_locks_is_named(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(BadInputError, match="has no locks"):
        make(plan, tmp_path / "out")


# The source while it is read.


@pytest.mark.parametrize("what", ["in place", "replaced", "companion"])
def test_a_source_that_changes_while_it_is_read_is_never_mixed(model: Path, tmp_path: Path, what: str) -> None:
    plan = plan_of(model)
    file = model / "generation_config.json" if what == "companion" else plan.source.weight_files[0]
    events = run(plan, tmp_path / "out")
    next(event for event in events if isinstance(event, Written) and event.finished)
    change_with_the_same_size_and_time(file, in_place=what == "in place")
    with pytest.raises(MlxqError, match=f"{file.name} changed"):
        list(events)
    assert not (tmp_path / "out").exists()
    make(plan_of(model), tmp_path / "out")
    make(plan_of(model), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_source_that_changes_between_a_stop_and_its_continuation_is_read_anew(
    model: Path, tmp_path: Path, in_place: bool
) -> None:
    stop_early(plan_of(model), tmp_path / "out")
    change_with_the_same_size_and_time(plan_of(model).source.weight_files[0], in_place=in_place)
    first, *_ = run(plan_of(model), tmp_path / "out")
    assert isinstance(first, Resumed)
    assert first.discarded
    make(plan_of(model), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def change_with_the_same_size_and_time(file: Path, *, in_place: bool) -> None:
    """Other numbers where the last ones are; nothing that ``ls`` shows differs."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    if in_place:
        with file.open("r+b") as stream:
            stream.write(content)
    else:
        file.with_name("other").write_bytes(content)
        os.replace(file.with_name("other"), file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# What is on the disk.


def test_after_the_machine_restarts_only_what_was_synced_counts(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxq.writing import journal, trailing

    make(plan, tmp_path / "whole")
    monkeypatch.setattr(trailing, "SYNC_BYTES", 1 << 14)
    events = run(plan, tmp_path / "out")
    finished = 0
    for event in events:
        finished += isinstance(event, Written) and event.finished is not None
        if finished == len(plan.steps) - 2:
            break
    events.close()
    file = tmp_path / "out.partial" / JOURNAL
    synced = {
        line["synced"]: line["bytes"] for line in map(json.loads, file.read_text().splitlines()) if "synced" in line
    }
    # What was not synced is lost.
    for shard in plan.shards:
        with (tmp_path / "out.partial" / "model" / shard.file).open("r+b") as stream:
            stream.seek(synced.get(shard.file, 0))
            stream.write(bytes(shard.nbytes - stream.tell()))
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    first, *_ = run(plan, tmp_path / "out")
    if isinstance(first, Resumed):
        assert first.step_count < finished
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
