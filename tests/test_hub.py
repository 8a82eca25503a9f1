"""Reading from the Hub: headers alone, whole, and file by file, through the real client against a Hub on loopback."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxq.errors import MlxqError
from mlxq.files import sha256_file
from mlxq.headers import encode_header
from mlxq.pipeline import Finished, prepare, run
from mlxq.planning.plan import Stored
from mlxq.recipe.load import load_recipe
from mlxq.retry import TRIES, Waiting, told
from mlxq.sources.download import Downloading, fetch
from mlxq.sources.resolve import resolve
from mlxq.tensors import TensorSpec
from mlxq.writing.disk_space import disk_use
from mlxq.writing.low_disk import most_held_bytes, steps_by_shard
from tests.checkpoints import LLAMA, build, llama, save
from tests.hub_server import READ_TOKEN, TOKEN, Hub
from tests.test_gguf import write_gguf

Command = Callable[..., subprocess.CompletedProcess[str]]
LARGE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
}
SHARDS = 30


def large_specs() -> list[TensorSpec]:
    """The tensors of a Llama of 70 billion parameters."""
    wide, inner, narrow = 8192, 28672, 1024
    shapes = {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (narrow, wide),
        "self_attn.v_proj": (narrow, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
    }
    layers = [(f"model.layers.{n}.{name}.weight", shape) for n in range(80) for name, shape in shapes.items()]
    outside = [("model.embed_tokens.weight", (128256, wide)), ("model.norm.weight", (wide,))]
    return [TensorSpec(n, "BF16", s) for n, s in (*outside, *layers, ("lm_head.weight", (128256, wide)))]


def add_large(hub: Hub, repo_id: str) -> None:
    """Put that model on the Hub: sparse files of its size, 141 GB in all."""
    specs = large_specs()
    per_shard = -(-len(specs) // SHARDS)
    files, weight_map = {}, {}
    for number in range(SHARDS):
        part = specs[number * per_shard : (number + 1) * per_shard]
        header = encode_header(part, {"format": "pt"})
        blob = hub.blob(f"{number:064x}")
        with blob.open("wb") as stream:
            stream.write(header)
            stream.flush()
            os.truncate(stream.fileno(), len(header) + sum(spec.nbytes for spec in part))
        name = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        files[name] = hub.stored_entry(blob.name, lfs=True)
        weight_map.update({spec.name: name for spec in part})
    texts = {
        "config.json": LARGE,
        "generation_config.json": {"eos_token_id": 2},
        "model.safetensors.index.json": {"weight_map": weight_map},
        "tokenizer.json": {"padding": "x" * 9_000_000},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"},
    }
    files |= {name: hub.entry(name, json.dumps(content).encode()) for name, content in texts.items()}
    hub.commit(hub.create(repo_id), "main", files, "large")


def mixture(folder: Path, shards: int) -> Path:
    """A mixture of experts, one tensor per expert, spread over all the shards."""
    config = {
        **LLAMA,
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "rope_theta": 1e4,
    }
    _, weights = build(config)
    loose = {}
    for name, array in weights.items():
        if ".switch_mlp." not in name:
            loose[name] = array
            continue
        for expert in range(4):
            loose[name.replace(".switch_mlp.", f".experts.{expert}.")] = mx.contiguous(array[expert])
    return save(folder, config, loose, shards)


def hashes(folder: Path) -> dict[str, str]:
    """Of all that the model is; report and card name where it came from."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in ("mlxq.json", "README.md")]
    return {f.relative_to(folder).as_posix(): sha256_file(f) for f in files}


def written(events: Iterator[Any]) -> Path:
    *_, last = events
    assert isinstance(last, Finished)
    return last.out


def from_folder(source: Path, out: Path, recipe: str = "4bit") -> dict[str, str]:
    return hashes(written(run(prepare(load_recipe(recipe), resolve(str(source))), out)))


def fetched_weights(hub: Hub) -> list[str]:
    """Blobs that were sent whole, in order."""
    return [r.path for r in hub.requests("GET", "/blobs/") if r.range is None and r.status == 200]


# Headers alone


def test_a_model_of_any_size_is_inspected_by_its_headers(hub: Hub, mlxq: Command) -> None:
    add_large(hub, "org/large")
    done = mlxq("inspect", "org/large", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == sum(spec.size for spec in large_specs())
    assert found["tokenizer"] == {
        "kind": "PreTrainedTokenizerFast",
        "vocabulary": 128256,
        "counted": False,
        "chat_template": True,
    }
    assert found["recipes"]["4bit"]["weight_bytes"] > 39e9
    assert sum(request.sent for request in hub.log) < 2_000_000
    # The list of files, three small ones (asked for, then sent), and each header (redirected, then sent).
    assert len(hub.log) == 1 + 2 * 3 + 2 * SHARDS
    assert all(request.range for request in hub.requests("GET", "/blobs/"))
    assert not [request for request in hub.log if request.storage and request.authorized]


def test_what_inspect_shows_is_what_it_shows_of_the_folder(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", shards=3)
    commit = hub.add_model("org/a", folder)
    here, there = (json.loads(mlxq("inspect", m, "--json").stdout) for m in (str(folder), f"org/a@{commit}"))
    for found in (here, there):
        del found["name"], found["tokenizer"]
    assert here == there
    assert not fetched_weights(hub)


def test_a_dry_run_plans_the_bytes_that_are_written_later(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    commit = hub.add_model("org/a", llama(tmp_path / "model", shards=3))
    arguments = ("quantize", "mixed_3_6", "--model", "org/a", "-o", str(tmp_path / "out"))
    plan = json.loads(mlxq(*arguments, "--dry-run", "--json").stdout)
    assert not fetched_weights(hub)
    assert plan["source"]["revision"] == commit
    assert not (tmp_path / "out").exists()
    done = mlxq(*arguments, "--no-generate")
    assert done.returncode == 0, done.stderr
    assert {name: (tmp_path / "out" / name).stat().st_size for name in plan["files"]} == plan["files"]
    sizes = {name: entry.size for name, entry in hub.repos["org/a"].commits[commit].items()}
    wanted = sum(size for name, size in sizes.items() if name != ".gitattributes")
    small = sum(sizes[n] for n in ("config.json", "generation_config.json", "tokenizer_config.json"))
    assert plan["disk"]["download_bytes"] in (wanted, wanted - small)


def test_the_tokenizer_is_fetched_where_a_text_asks_for_it(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model"))
    assert mlxq("inspect", "org/a").returncode == 0
    assert not hub.requests("GET", "/tokenizer.json")
    done = mlxq("inspect", "org/a", "--text", "abc", "--json")
    assert json.loads(done.stdout)["encoding"]["decoded"].replace(" ", "") == "abc"
    assert not fetched_weights(hub)


def test_a_gguf_file_is_known_by_its_header(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, "llama")
    with file.open("ab") as stream:
        stream.write(bytes(4_000_000))
    content = file.read_bytes()
    hub.add_model("org/one", {"tiny.gguf": content})
    hub.add_model("org/two", {"q4/tiny.gguf": content, "q8/tiny.gguf": content})
    here, one, two = (
        json.loads(mlxq("inspect", model, "--json").stdout) for model in (str(file), "org/one", "org/two/q8/tiny.gguf")
    )
    for found in (here, one, two):
        del found["name"]
    assert here == one == two
    assert sum(request.sent for request in hub.log) < 2_000_000
    unnamed = mlxq("inspect", "org/two")
    assert unnamed.returncode == 2
    assert "org/two/q4/tiny.gguf" in unnamed.stderr
    misspelt = mlxq("inspect", "org/two/q8/tinny.gguf")
    assert misspelt.returncode == 2
    assert "Did you mean org/two/q8/tiny.gguf?" in misspelt.stderr
    done = mlxq("convert", "org/two/q8/tiny.gguf", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert mlxq("convert", str(file), "-o", str(tmp_path / "same")).returncode == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "same")
    rebuilt = mlxq("quantize", "--locked", str(tmp_path / "out" / "mlxq.json"), "-o", str(tmp_path / "again"))
    assert rebuilt.returncode == 0, rebuilt.stderr


# Whole


def test_only_what_is_needed_is_fetched(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", shards=2)
    (folder / "LICENSE").write_text("Do as you like.")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\n---\n# Tiny\n")
    hub.add_model("org/a", folder)
    extra = {
        "pytorch_model.bin": b"pickled",
        "pytorch_model.bin.index.json": b"{}",
        "consolidated.safetensors": b"again",
        "original/consolidated.00.pth": b"again",
        "original/params.json": b"{}",
        "original/additional_chat_templates/other.jinja": b"{{ other }}",
        "onnx/model.onnx": b"again",
        "model.fp16.safetensors": b"not listed",
        "picture.png": b"picture",
        "modeling_custom.py": b"raise SystemExit('executed')",
    }
    commit = hub.add_model("org/a", extra)
    done = mlxq("quantize", "4bit", "--model", "org/a", "-o", str(tmp_path / "out"), "--no-generate")
    assert done.returncode == 0, done.stderr
    asked = {r.path.split("?")[0].partition(f"/resolve/{commit}/")[2] for r in hub.log if "/resolve/" in r.path}
    assert not asked & extra.keys()
    assert len(fetched_weights(hub)) == 2
    assert hashes(tmp_path / "out") == from_folder(folder, tmp_path / "same")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    report = json.loads((tmp_path / "out" / "mlxq.json").read_text())
    assert report["source"]["revision"] == commit
    assert report["source"]["base_model"] == "org/a"
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    # The branch moves on; what was recorded is rebuilt from the commit.
    hub.add_model("org/a", llama(tmp_path / "newer", shards=2, hidden_size=256))
    locked = mlxq("quantize", "--locked", str(tmp_path / "out" / "mlxq.json"), "-o", str(tmp_path / "again"))
    assert locked.returncode == 0, locked.stderr
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")


def test_code_is_fetched_only_if_it_is_trusted(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "custom.py"}))
    (folder / "custom.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    hub.add_model("org/a", folder)
    arguments = ("quantize", "4bit", "--model", "org/a", "--dry-run")
    refused = mlxq(*arguments)
    assert refused.returncode == 2
    assert "--trust-remote-code" in refused.stderr
    assert not hub.requests("", "custom.py")
    trusted = mlxq(*arguments, "--trust-remote-code")
    assert trusted.returncode == 0, trusted.stderr
    assert hub.requests("GET", "custom.py")


def test_offline_it_comes_from_the_cache(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model", shards=2))
    arguments = ("quantize", "4bit", "--model", "org/a", "--no-generate", "-o")
    unknown = mlxq(*arguments, str(tmp_path / "none"), HF_HUB_OFFLINE="1")
    assert unknown.returncode == 2
    assert "HF_HUB_OFFLINE" in unknown.stderr
    assert mlxq("inspect", "org/a").returncode == 0
    headers_only = mlxq(*arguments, str(tmp_path / "none"), HF_HUB_OFFLINE="1")
    assert headers_only.returncode == 2
    assert mlxq(*arguments, str(tmp_path / "one")).returncode == 0
    asked = len(hub.log)
    offline = mlxq(*arguments, str(tmp_path / "two"), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.log) == asked
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


# File by file


@pytest.mark.parametrize(("make", "shards"), [(llama, 5), (mixture, 5)])
def test_low_disk_holds_no_more_than_it_said(hub: Hub, tmp_path: Path, make: Callable[..., Path], shards: int) -> None:
    folder = make(tmp_path / "model", shards=shards)
    repo = f"org/low-{make.__name__}"
    commit = hub.add_model(repo, folder)
    plan = prepare(load_recipe("4bit"), resolve(repo))
    use = disk_use(plan, tmp_path / "out", low_disk=True)
    place = tmp_path / "out.partial" / "source"
    most = 0
    events = run(plan, tmp_path / "out", low_disk=True)
    for event in events:
        most = max(most, held_bytes(place))
        if isinstance(event, Finished):
            assert event.report["source"]["revision"] == commit
    assert 0 < most <= use.source_bytes
    if make is llama:
        largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert use.source_bytes <= 2 * largest
    assert len(fetched_weights(hub)) == shards
    assert hashes(tmp_path / "out") == from_folder(folder, tmp_path / "same")
    assert not place.exists()


def held_bytes(place: Path) -> int:
    """Bytes of weights in a folder, files on their way included."""
    total = 0
    for file in place.rglob("*"):
        if file.suffix in (".safetensors", ".incomplete"):
            try:
                total += file.stat().st_size
            except FileNotFoundError:  # moved or dropped between the two looks
                continue
    return total


def test_experts_are_assembled_once_all_their_shards_are_here(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/experts", mixture(tmp_path / "model", shards=4))
    plan = prepare(load_recipe("4bit"), resolve("org/experts"))
    planned = steps_by_shard(plan)
    here: set[str] = set()
    for stage in planned:
        here.add(stage.shard.name)
        for step in stage.steps:
            if step.source is not None:
                assert plan.source.stored[step.source].file.name in here  # type: ignore[attr-defined]
            else:
                experts = [
                    tensor
                    for tensor in plan.source.tensors
                    if tensor.startswith(step.path.partition(".switch_mlp.")[0] + ".experts.")
                    and tensor.endswith(step.path.partition(".switch_mlp.")[2])
                ]
                assert len(experts) == 4
                assert {plan.source.stored[t].file.name for t in experts} <= here  # type: ignore[attr-defined]
        here -= set(stage.dropped)
    assert not here
    assert sorted(step.path for stage in planned for step in stage.steps) == sorted(s.path for s in plan.steps)
    assert most_held_bytes(planned) <= sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))


def test_what_is_stored_quantized_is_read_with_its_scales(hub: Hub, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    from_folder(llama(tmp_path / "model"), quantized)
    weights = mx.load(str(quantized / "model.safetensors"))
    config = json.loads((quantized / "config.json").read_text())
    folder = save(tmp_path / "shards", config, weights, shards=4)
    hub.add_model("org/quantized", folder)
    options = Stored.REQUANTIZE
    for name, model in (("here", str(folder)), ("there", "org/quantized")):
        plan = prepare(load_recipe("8bit"), resolve(model), options)
        written(run(plan, tmp_path / name, low_disk=True))
    assert hashes(tmp_path / "here") == hashes(tmp_path / "there")


def test_a_killed_low_disk_run_continues(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", shards=6, hidden_size=256, num_hidden_layers=6)
    hub.add_model("org/a", folder)
    hub.fail("GET", "/blobs/", times=10**6, bytes_per_second=2_000_000)
    arguments = ("quantize", "8bit", "--model", "org/a", "-o", str(tmp_path / "out"), "--no-generate", "--low-disk")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxq", *arguments],
        env={**os.environ, **hub.env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.is_file() and journal.read_bytes().count(b"\n") > 12):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out.partial").is_dir()
    hub.faults.clear()
    before = len(fetched_weights(hub))
    assert 0 < before < 6
    done = mlxq(*arguments)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    # At most the one in use and the one on its way are fetched again.
    assert len(fetched_weights(hub)) - before <= 6 - before + 2
    assert hashes(tmp_path / "out") == from_folder(folder, tmp_path / "same", "8bit")


def test_what_reads_the_source_twice_is_refused_with_low_disk(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model", shards=2))
    recipe = tmp_path / "gated.yaml"
    recipe.write_text("model: org/a\ndefault: {bits: 4}\ngates: [kl_mean < 1]\n")
    for arguments in (("quantize", "org/a", "--bpw", "4.5"), ("quantize", str(recipe))):
        done = mlxq(*arguments, "-o", str(tmp_path / "out"), "--low-disk")
        assert done.returncode == 2
        assert "--low-disk" in done.stderr
    assert not fetched_weights(hub)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_model_larger_than_the_disk(hub: Hub, mlxq: Command, tmp_path: Path, small_disk: Path) -> None:
    folder = llama(tmp_path / "model", shards=12, hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size > 28e6
    hub.add_model("org/a", folder)
    arguments = ("quantize", "4bit", "--model", "org/a", "-o", str(small_disk / "out"), "--no-generate")
    refused = mlxq(*arguments, HF_HUB_CACHE=str(small_disk / "cache"))
    assert refused.returncode == 1
    assert "are missing" in refused.stderr
    assert "--low-disk needs" in refused.stderr
    assert not fetched_weights(hub)
    done = mlxq(*arguments, "--low-disk", HF_HUB_CACHE=str(small_disk / "cache"))
    assert done.returncode == 0, done.stderr
    assert hashes(small_disk / "out") == from_folder(folder, tmp_path / "same")


# What goes wrong


def test_a_name_that_is_not_there(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/Llama-3.2-3B-Instruct", llama(tmp_path / "model"))
    for typed in ("org/Llama-3.2-3B-Instuct", "orgg/Llama-3.2-3B-Instruct"):
        done = mlxq("inspect", typed)
        assert done.returncode == 2
        assert "Did you mean org/Llama-3.2-3B-Instruct?" in done.stderr
    assert "hf auth login" in mlxq("inspect", "other/thing", HF_TOKEN="").stderr


def test_a_repository_without_weights_that_can_be_read(hub: Hub, mlxq: Command) -> None:
    hub.add_model("org/bin", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    done = mlxq("inspect", "org/bin")
    assert done.returncode == 2
    assert "only pytorch_model.bin" in done.stderr


def test_an_index_that_lists_what_is_not_there(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    hub.add_model("org/a", folder)
    done = mlxq("inspect", "org/a")
    assert done.returncode == 2
    assert "incomplete" in done.stderr
    assert "model-00002-of-00003.safetensors" in done.stderr


def test_a_broken_header_names_the_repository(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 1000)
    hub.add_model("org/a", folder)
    done = mlxq("inspect", "org/a")
    assert done.returncode == 2
    assert "org/a/model.safetensors is not a valid safetensors file" in done.stderr


@pytest.mark.parametrize(("token", "step"), [("", "hf auth login"), (READ_TOKEN, "Agree and access repository")])
def test_gated(hub: Hub, mlxq: Command, tmp_path: Path, token: str, step: str) -> None:
    hub.add_model("org/gated", llama(tmp_path / "model"), gated="manual")
    done = mlxq("inspect", "org/gated", HF_TOKEN=token)
    assert done.returncode == 2
    assert "org/gated is gated" in done.stderr
    assert f"{hub.url}/org/gated" in done.stderr.replace("\n", "")
    assert step in done.stderr
    assert mlxq("inspect", "org/gated", HF_TOKEN=TOKEN).returncode == 0


def test_a_private_one_needs_a_login(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/private", llama(tmp_path / "model"), private=True)
    done = mlxq("inspect", "org/private", HF_TOKEN="")
    assert done.returncode == 2
    assert "log in first: hf auth login" in done.stderr
    assert mlxq("inspect", "org/private").returncode == 0
    assert TOKEN not in done.stderr


def test_a_revision_that_is_not_there(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model"))
    done = mlxq("inspect", "org/a@v2")
    assert done.returncode == 2
    assert "no revision 'v2'" in done.stderr
    assert "It has main." in done.stderr


def test_a_rate_limit_is_waited_for_and_told(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/limited", llama(tmp_path / "model", shards=2))
    hub.fail("GET", "/api/models/org/limited", times=2, status=429, headers={"Retry-After": "0"})
    hub.fail("GET", "/resolve/", times=1, status=429, headers={"Retry-After": "0"})
    waits: list[Waiting] = []
    source = resolve("org/limited", on_event=waits.append)
    assert source.remote is not None
    assert [wait.reason for wait in waits][:2] == ["the Hub limits how often it may be asked"] * 2


def test_a_rate_limit_shows_on_stderr(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model"))
    hub.fail("GET", "/api/models/org/a", times=1, status=429, headers={"Retry-After": "1"})
    done = mlxq("inspect", "org/a", "--json")
    assert done.returncode == 0
    assert "the Hub limits how often it may be asked; trying again in 1 s" in done.stderr
    json.loads(done.stdout)


def test_a_limit_of_a_day_is_not_waited_for(hub: Hub, mlxq: Command, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model"))
    hub.fail("GET", "/api/models/org/a", times=100, status=429, headers={"Retry-After": "86400"})
    done = mlxq("inspect", "org/a")
    assert done.returncode == 1
    assert "limits how often it may be asked, and asks to wait 86,400 s" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_limit_that_only_a_ratelimit_field_names_is_waited_for_and_told(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/a", llama(tmp_path / "model"))
    # More often than anything else is tried, where the Hub lists files and where it sends them.
    for path, times in (("/api/models/org/a", TRIES), ("/blobs/", 1)):
        hub.fail("GET", path, times=times, status=429, headers={"RateLimit": '"api";r=0;t=1'})
    waits: list[Waiting | Downloading] = []
    began = time.monotonic()
    source = resolve("org/a", on_event=waits.append)
    told(fetch(source), waits.append)
    limits = [event for event in waits if isinstance(event, Waiting)]
    assert limits == [Waiting(1, "the Hub limits how often it may be asked")] * (TRIES + 1)
    assert time.monotonic() - began >= TRIES


def test_trouble_of_the_hub_is_waited_for(hub: Hub, tmp_path: Path) -> None:
    hub.add_model("org/troubled", llama(tmp_path / "model", shards=2))
    hub.fail("GET", "/api/models/", status=500)
    hub.fail("GET", "/blobs/", status=503)
    hub.fail("GET", "/blobs/", drop_after=100)
    waits: list[Waiting] = []
    resolve("org/troubled", on_event=waits.append)
    assert {wait.reason for wait in waits} == {
        "the Hub answered 500",
        "the Hub answered 503",
        "the connection to the Hub broke",
    }


def test_nothing_listens_there(mlxq: Command) -> None:
    done = mlxq("inspect", "org/a", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the connection to the Hub broke; trying again" in done.stderr
    assert "Check the connection" in done.stderr


def test_a_dropped_download_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", hidden_size=1024, intermediate_size=2048)
    hub.add_model("org/dropped", folder)
    plan = prepare(load_recipe("4bit"), resolve("org/dropped"))
    hub.fail("GET", "/blobs/", drop_after=30_000_000)
    out = written(run(plan, tmp_path / "out"))
    assert hashes(out) == from_folder(folder, tmp_path / "same")
    # The client keeps what came in pieces of 10 MiB.
    last = hub.requests("GET", "/blobs/")[-1]
    assert last.range in ("bytes=10485760-", "bytes=20971520-")
    size = (folder / "model.safetensors").stat().st_size
    assert sum(r.sent for r in hub.requests("GET", "/blobs/")) < 1.8 * size


def test_an_interrupted_download_keeps_what_is_complete(hub: Hub, tmp_path: Path) -> None:
    folder = llama(tmp_path / "model", shards=4, hidden_size=256)
    hub.add_model("org/interrupted", folder)
    plan = prepare(load_recipe("4bit"), resolve("org/interrupted"))
    slow = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]["lm_head.weight"]
    sha256 = sha256_file(folder / slow)
    hub.fail("GET", f"/blobs/{sha256}", bytes_per_second=200_000)
    events = run(plan, tmp_path / "out")
    while len(fetched_weights(hub)) < 3:
        assert isinstance(next(events), Downloading)
    time.sleep(0.3)
    events.close()  # type: ignore[attr-defined]
    assert not (tmp_path / "out.partial").exists()
    hub.log.clear()
    assert hashes(written(run(plan, tmp_path / "out"))) == from_folder(folder, tmp_path / "same")
    assert [path.partition("?")[0] for path in fetched_weights(hub)] == [f"/blobs/{sha256}"]


def downloaded(repo: str, out: Path, *, low_disk: bool) -> str | None:
    """Quantize a model of the Hub; the message of the error that ended it, or None."""
    try:
        written(run(prepare(load_recipe("4bit"), resolve(repo)), out, low_disk=low_disk))
    except MlxqError as error:
        return error.message
    return None


def drops(hub: Hub, tmp_path: Path, count: int, seed: int) -> None:
    """``count`` downloads over a line that breaks at random: complete and the same, or a clear error and a next run."""
    folder = llama(tmp_path / "model", shards=3)
    expected = from_folder(folder, tmp_path / "same")
    repos = [f"org/drops-{seed}-{number}" for number in range(count)]
    for repo in repos:
        hub.add_model(repo, folder)
    hub.random = random.Random(seed)
    hub.drop_rate = 0.2

    def attempt(number: int) -> str | None:
        return downloaded(repos[number], tmp_path / f"out-{number}", low_disk=bool(number % 2))

    with ThreadPoolExecutor(10) as pool:
        messages = list(pool.map(attempt, range(count)))
    hub.drop_rate = 0.0
    assert len([request for request in hub.log if request.dropped]) > count
    for number, message in enumerate(messages):
        if message is not None:
            assert "the connection to the Hub broke" in message
            assert not (tmp_path / f"out-{number}").exists()
            assert attempt(number) is None
        assert hashes(tmp_path / f"out-{number}") == expected


def test_random_drops(hub: Hub, tmp_path: Path) -> None:
    drops(hub, tmp_path, 20, seed=1)


@pytest.mark.slow
def test_many_random_drops(hub: Hub, tmp_path: Path) -> None:
    drops(hub, tmp_path, 100, seed=1000)
