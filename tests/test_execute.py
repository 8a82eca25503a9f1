"""Interrupted runs continue and end in the same bytes; nothing half-written looks finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from mlxq.errors import BadInputError, MlxqError
from mlxq.files import sha256_file
from mlxq.pipeline import Finished, Resumed, prepare, run
from mlxq.planning.plan import Plan
from mlxq.recipe.load import load_recipe
from mlxq.sources.resolve import resolve
from mlxq.writing.execute import Written, blocks_of
from tests.checkpoints import LLAMA, build, llama, save


def plan_of(model: Path) -> Plan:
    return prepare(load_recipe("4bit"), resolve(str(model)))


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: sha256_file(f) for f in folder.iterdir() if f.name not in ("mlxq.json", "README.md")}


def test_an_interrupted_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_of(llama(tmp_path / "model", shards=2))
    *_, whole = run(plan, tmp_path / "whole")
    assert isinstance(whole, Finished)
    events = run(plan, tmp_path / "out")
    finished = 0
    for event in events:
        finished += isinstance(event, Written) and event.finished is not None
        if finished == 5:
            break
    events.close()
    assert not (tmp_path / "out").exists()
    resumed, *_, last = run(plan, tmp_path / "out")
    assert isinstance(resumed, Resumed)
    assert resumed.step_count >= 5
    assert not resumed.discarded
    assert isinstance(last, Finished)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_kill_9_leaves_a_partial_folder_that_the_same_command_finishes(tmp_path: Path) -> None:
    llama(tmp_path / "model", hidden_size=512, intermediate_size=1024, num_hidden_layers=24)
    command = [
        sys.executable,
        "-m",
        "mlxq",
        "quantize",
        "8bit",
        "--model",
        "model",
        "-o",
        "out",
        "--no-generate",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "out").exists():
        assert (tmp_path / "out.partial").is_dir()
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([*command[:-3], "-o", "whole", "--no-generate"], cwd=tmp_path, check=True, capture_output=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_work_on_another_plan_is_not_mixed_in(tmp_path: Path) -> None:
    plan = plan_of(llama(tmp_path / "model"))
    events = run(plan, tmp_path / "out")
    next(e for e in events if isinstance(e, Written) and e.finished)
    events.close()
    other = prepare(load_recipe("8bit"), resolve(str(tmp_path / "model")))
    resumed, *_ = run(other, tmp_path / "out")
    assert isinstance(resumed, Resumed)
    assert resumed.discarded
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 8


@pytest.mark.parametrize("name", ["4bit", "mxfp4"])
def test_weights_that_are_no_numbers_are_not_quantized_into_some(name: str, tmp_path: Path) -> None:
    weights = build(LLAMA)[1]
    broken = "model.layers.1.mlp.up_proj.weight"
    weights[broken] = mx.where(
        mx.arange(weights[broken].size).reshape(weights[broken].shape) == 77, mx.nan, weights[broken]
    )
    plan = prepare(load_recipe(name), resolve(str(save(tmp_path / "model", LLAMA, weights))))
    with pytest.raises(MlxqError, match=f"{broken} holds NaN"):
        list(run(plan, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_two_runs_cannot_write_the_same_folder(tmp_path: Path) -> None:
    plan = plan_of(llama(tmp_path / "model"))
    first = run(plan, tmp_path / "out")
    next(first)
    with pytest.raises(BadInputError, match="right now"):
        next(run(plan, tmp_path / "out"))
    first.close()


def test_a_source_cut_short_while_reading_fails_and_is_never_published(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    plan = plan_of(model)
    os.truncate(model / "model.safetensors", 20_000)
    with pytest.raises(MlxqError, match="shorter"):
        list(run(plan, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_every_file_is_hashed_and_sidecars_are_byte_copies(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    *_, last = run(plan_of(model), tmp_path / "out")
    assert isinstance(last, Finished)
    recorded = json.loads((tmp_path / "out" / "mlxq.json").read_text())["files"]
    present = {f.name for f in (tmp_path / "out").iterdir()} - {"mlxq.json"}
    assert set(recorded) == present
    assert all(facts["sha256"] == sha256_file(tmp_path / "out" / name) for name, facts in recorded.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    loaded, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert isinstance(mlx_lm.generate(loaded, tokenizer, prompt="abc", max_tokens=3), str)


def test_blocks_cover_every_row_once(tmp_path: Path) -> None:
    plan = plan_of(llama(tmp_path / "model", vocab_size=96))
    for step in plan.steps:
        blocks = blocks_of(step)
        rows = [row for block in blocks for row in range(block.start, block.stop)]
        assert rows == list(range(step.spec.rows))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_assembling_holds_one_tensor_not_the_model(tmp_path: Path) -> None:
    """Six tensors of 32 MB stored at 4 bits are read as numbers; two of them at once would pass the limit."""
    model = llama(
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=16384,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    *_, last = run(plan_of(model), tmp_path / "4bit")
    assert isinstance(last, Finished)
    peak = (
        "import sys\n"
        "from mlxq.pipeline import prepare, run\n"
        "from mlxq.planning.plan import Stored\n"
        "from mlxq.recipe.load import recipe_from_dict\n"
        "from mlxq.sources.resolve import resolve\n"
        "def peak():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return int(text.split('VmHWM:')[1].split()[0]) / 1024\n"
        "plan = prepare(recipe_from_dict({}, 'convert'), resolve(sys.argv[1]), Stored.DEQUANTIZE)\n"
        "import mlx_lm.utils\n"
        "before = peak()\n"
        "list(run(plan, __import__('pathlib').Path(sys.argv[2])))\n"
        "print(peak() - before)\n"
    )
    command = [sys.executable, "-c", peak, str(tmp_path / "4bit"), str(tmp_path / "numbers")]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    largest = max(step.spec.nbytes for step in plan_of(model).steps) / 2**20
    assert grown < 96 + largest, "workers' blocks and MLX's cache of 64 MiB, and one tensor"
