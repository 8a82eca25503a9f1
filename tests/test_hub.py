"""Reading from the Hub, through the real client against a Hub on loopback."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxq.sources.hub import FIRST_BYTES
from mlxq.writer import sha256_file
from tests.checkpoints import llama
from tests.hub_server import READ_TOKEN, TOKEN, Hub

Command = Callable[..., subprocess.CompletedProcess[str]]
MODEL = "org/tiny"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint with files that nobody needs beside it."""
    folder = llama(tmp_path_factory.mktemp("hub") / "tiny", shards=2, hidden_size=256, intermediate_size=512)
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\n---\n# Tiny\n")
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 3_000_000)
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"\0" * 1000)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a repository was run')\n")
    return folder


@pytest.fixture
def there(hub: Hub, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The model on the Hub, and an empty cache; returns the commit."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return hub.add_model(MODEL, original)


def home(tmp_path: Path) -> dict[str, str]:
    return {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}


def weights(folder: Path) -> dict[str, str]:
    return {f.name: sha256_file(f) for f in folder.glob("model*.safetensors")}


def test_inspect_reads_headers_and_little_else(
    hub: Hub, there: str, mlxq: Command, original: Path, tmp_path: Path
) -> None:
    shown = mlxq("inspect", MODEL, "--json", **home(tmp_path))
    assert shown.returncode == 0, shown.stderr
    facts, here = json.loads(shown.stdout), json.loads(mlxq("inspect", str(original), "--json").stdout)
    for key in ("architecture", "parameters", "dtypes", "modules", "recipes", "stored_bytes"):
        assert facts[key] == here[key], key
    of_weights = hub.requests("GET", ".safetensors")
    stored = sum(file.stat().st_size for file in original.glob("model*.safetensors"))
    assert 0 < sum(request.sent for request in of_weights) < stored / 2
    assert all(request.range for request in hub.requests("GET", "/blobs/"))
    assert sum(request.sent for request in hub.requests()) < 4 * FIRST_BYTES


def test_headers_of_a_large_model_are_a_few_requests(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    """A gigabyte of holes, which nothing may download."""
    from mlxq.architecture import encode_header
    from mlxq.tensors import TensorSpec

    folder = llama(tmp_path / "large")
    (folder / "model.safetensors").unlink()
    specs = [TensorSpec(f"model.layers.0.mlp.{name}_proj.weight", "BF16", (8192, 28672)) for name in ("gate", "up")]
    header = encode_header(specs, {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    hub.add_model("org/large", folder)
    shown = mlxq("inspect", "org/large", "--json", **home(tmp_path))
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["stored_bytes"] == sum(spec.nbytes for spec in specs)
    assert sum(request.sent for request in hub.requests()) < 2_000_000
    assert len(hub.requests()) < 20


def test_a_plan_needs_no_weights_and_comes_true(
    hub: Hub, there: str, mlxq: Command, original: Path, tmp_path: Path
) -> None:
    planned = mlxq("quantize", "4bit", "--model", MODEL, "--dry-run", "--json", **home(tmp_path))
    assert planned.returncode == 0, planned.stderr
    assert not [r for r in hub.requests("GET", "/blobs/") if not r.range]
    done = mlxq("quantize", "4bit", "--model", MODEL, "-o", str(tmp_path / "out"), "--no-generate", **home(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(planned.stdout)["file_bytes"] == sum(
        f.stat().st_size for f in (tmp_path / "out").glob("model*.safetensors")
    )
    report = json.loads((tmp_path / "out" / "mlxq.json").read_text())
    assert report["source"]["revision"] == there
    assert report["source"]["base_model"] == MODEL
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    mlxq("quantize", "4bit", "--model", str(original), "-o", str(tmp_path / "local"), "--no-generate")
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert not hub.requests("GET", "pytorch_model.bin")
    assert not hub.requests("GET", "consolidated")
    assert not hub.requests("GET", "modeling_tiny.py"), "code is fetched only where it may run"


def test_offline_works_from_the_cache(hub: Hub, there: str, mlxq: Command, tmp_path: Path) -> None:
    arguments = ("convert", MODEL, "--no-generate", "-o")
    nothing = mlxq(*arguments, str(tmp_path / "a"), HF_HUB_OFFLINE="1", **home(tmp_path))
    assert nothing.returncode == 1
    assert "HF_HUB_OFFLINE" in nothing.stderr
    assert mlxq(*arguments, str(tmp_path / "b"), **home(tmp_path)).returncode == 0
    asked = len(hub.requests())
    again = mlxq(*arguments, str(tmp_path / "c"), HF_HUB_OFFLINE="1", **home(tmp_path))
    assert again.returncode == 0, again.stderr
    assert len(hub.requests()) == asked
    assert weights(tmp_path / "b") == weights(tmp_path / "c")


def test_a_gguf_file_by_its_id(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    nothing = mlxq("inspect", "org/none/model.gguf", **home(tmp_path))
    assert nothing.returncode == 2
    hub.add_model("org/gguf", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    several = mlxq("inspect", "org/gguf", **home(tmp_path))
    assert several.returncode == 2
    assert "org/gguf/a.gguf" in several.stderr
    missing = mlxq("inspect", "org/gguf/c.gguf", **home(tmp_path))
    assert "has no file 'c.gguf'" in missing.stderr


@pytest.mark.parametrize(
    ("model", "says", "hint", "code"),
    [
        ("org/tinny", "no model at 'org/tinny'", "org/tiny", 2),
        ("org/tiny@nowhere", "no revision 'nowhere'", "branch", 2),
        ("org/gated", "gated", "accept its terms", 2),
        ("org/hidden", "no repository on the Hub that you can see", "hf auth login", 2),
    ],
)
def test_what_the_hub_does_not_give(
    hub: Hub, there: str, mlxq: Command, tmp_path: Path, model: str, says: str, hint: str, code: int
) -> None:
    hub.add_model("org/gated", {"config.json": b"{}", "model.safetensors": b"x" * 64}, gated="manual")
    hub.create("org/hidden", private=True)
    token = {"HF_TOKEN": {"org/hidden": "", "org/gated": READ_TOKEN}.get(model, TOKEN)}
    result = mlxq("inspect", model, **home(tmp_path), **token)
    assert result.returncode == code, result.stderr
    assert says in result.stderr
    assert hint in result.stderr
    assert TOKEN not in result.stderr + result.stdout


def test_patience_with_a_busy_hub(hub: Hub, there: str, mlxq: Command, tmp_path: Path) -> None:
    hub.fail("GET", "/api/models/org/tiny", status=429, headers={"Retry-After": "1"})
    hub.fail("GET", ".safetensors", status=503)
    result = mlxq("quantize", "4bit", "--model", MODEL, "--dry-run", **home(tmp_path))
    assert result.returncode == 0, result.stderr


def test_a_hub_in_trouble_is_one_line(hub: Hub, there: str, mlxq: Command, tmp_path: Path) -> None:
    hub.fail("GET", "/api/models/org/tiny", status=429, headers={"Retry-After": "100000"}, times=100)
    result = mlxq("inspect", MODEL, **home(tmp_path))
    assert result.returncode == 1
    assert "limits how often" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="session")
def many_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight weight files, 27 MB in all."""
    changes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    return llama(tmp_path_factory.mktemp("many") / "many", shards=8, **changes)


def test_low_disk_holds_one_file_at_a_time_and_continues(
    hub: Hub, mlxq: Command, many_files: Path, tmp_path: Path
) -> None:
    hub.add_model("org/many", many_files)
    arguments = ("quantize", "4bit", "--model", "org/many", "--low-disk", "--no-generate", "-o", str(tmp_path / "out"))
    largest = max(file.stat().st_size for file in many_files.glob("*.safetensors"))
    planned = mlxq(*arguments, "--dry-run", "--json", **home(tmp_path))
    said = mlxq(*arguments, "--dry-run", **home(tmp_path))
    assert "With --low-disk it needs" in said.stdout, said.stderr
    # The connection breaks again and again, late enough for headers to come; files that came before stand.
    done = mlxq(*arguments[:-1], str(tmp_path / "whole"), **home(tmp_path))
    order = [r.path for r in hub.requests("GET", "/blobs/") if not r.range]
    assert len(order) == 8, done.stderr
    fault = hub.fail("GET", order[4], drop_after=100_000, times=1000)
    stopped = mlxq(*arguments, **home(tmp_path))
    assert stopped.returncode != 0
    assert (tmp_path / "out.partial").is_dir()
    assert not list((tmp_path / "out.download").glob("*.safetensors"))
    assert "Run the same command again" in stopped.stderr
    fault.times = 0
    done = mlxq(*arguments, **home(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "were finished" in done.stderr
    assert not (tmp_path / "out.download").exists()
    mlxq("quantize", "4bit", "--model", str(many_files), "-o", str(tmp_path / "local"), "--no-generate")
    assert weights(tmp_path / "out") == weights(tmp_path / "local")
    assert json.loads(planned.stdout)["file_bytes"] + largest < sum(f.stat().st_size for f in many_files.iterdir())


def test_low_disk_works_on_a_disk_smaller_than_the_model(
    hub: Hub, mlxq: Command, many_files: Path, tmp_path: Path
) -> None:
    hub.add_model("org/many", many_files)
    disk = tmp_path / "disk"
    disk.mkdir()
    size = "size=16m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        arguments = ("quantize", "4bit", "--model", "org/many", "--low-disk", "--no-generate")
        done = mlxq(*arguments, "-o", str(disk / "out"), **home(tmp_path))
        assert done.returncode == 0, done.stderr
        assert weights(disk / "out")
        assert sum(f.stat().st_size for f in many_files.glob("*.safetensors")) > 16 << 20
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quantize", "4bit", "--model", "FOLDER"), "is here"),
        (("quantize", "4bit", "--model", "org/many", "--set", "method=fit"), "cannot calibrate"),
        (("quantize", "org/many", "--bpw", "4.5"), "cannot calibrate"),
    ],
)
def test_low_disk_says_what_it_cannot(
    hub: Hub, mlxq: Command, many_files: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    hub.add_model("org/many", many_files)
    given = [str(many_files) if word == "FOLDER" else word for word in arguments]
    result = mlxq(*given, "--low-disk", "-o", str(tmp_path / "out"), **home(tmp_path))
    assert result.returncode == 2, result.stderr
    assert says in result.stderr


def drops(hub: Hub, mlxq: Command, tmp_path: Path, original: Path, count: int) -> None:
    """Each download ends complete and identical, or with a clear error and a second run that continues."""
    chance = random.Random(7)
    want = None
    for number in range(count):
        hub.fail("GET", "/blobs/", drop_after=chance.randrange(1, 200_000), times=chance.randrange(1, 4))
        place = home(tmp_path / str(number))
        out = tmp_path / str(number) / "out"
        for _ in range(6):
            run = mlxq("convert", MODEL, "-o", str(out), "--no-generate", "--quiet", **place)
            if run.returncode == 0:
                break
            assert run.returncode == 1
            assert "Run the same command again" in run.stderr
            assert "Traceback" not in run.stderr
        want = want or weights(out)
        assert weights(out) == want
        assert len(want) >= 1


def test_dropped_downloads_end_identical(hub: Hub, there: str, mlxq: Command, original: Path, tmp_path: Path) -> None:
    drops(hub, mlxq, tmp_path, original, 3)


@pytest.mark.slow
def test_many_dropped_downloads_end_identical(
    hub: Hub, there: str, mlxq: Command, original: Path, tmp_path: Path
) -> None:
    drops(hub, mlxq, tmp_path, original, 100)
