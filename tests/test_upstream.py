"""An ``mlx_lm`` that an update changed: one clear line, from a real module altered in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlxq import upstream
from tests.checkpoints import llama

RUN = "from mlxq.cli import main; sys.argv = ['mlxq', *{argv!r}]; main()"


def altered(change: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run mlxq in a process where ``change`` was made to ``mlx_lm`` first."""
    code = f"import sys, mlx_lm, mlx_lm.utils, mlx_lm.models.cache\n{change}\n{RUN.format(argv=list(argv))}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("del mlx_lm.utils.load_model", "there is no mlx_lm.utils.load_model"),
        (
            "mlx_lm.utils.load_model = lambda path, lazy=False, strict=True: None",
            "mlx_lm.utils.load_model takes no 'get_model_classes'",
        ),
        (
            "def load_model(path, lazy, strict, model_config, get_model_classes, trust_remote_code): ...\n"
            "mlx_lm.utils.load_model = load_model",
            "mlx_lm.utils.load_model has no default for 'get_model_classes'",
        ),
    ],
)
def test_what_an_update_took_away_is_one_line(tmp_path: Path, change: str, said: str) -> None:
    done = altered(change, "quantize", "4bit", "--model", str(llama(tmp_path / "m")), "--dry-run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = " ".join(done.stderr.split())
    assert f"is not as mlxq expects it (tested with {upstream.TESTED}): {said}" in line
    assert f"pip install mlx-lm=={upstream.TESTED}" in line


def test_a_module_that_moved_is_named() -> None:
    code = (
        "import sys; sys.modules['mlx_lm.models.mla'] = None\n"
        "from mlxq import upstream\n"
        "try: upstream.multi_linears()\n"
        "except upstream.UpstreamError as error: print(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("there is no mlx_lm.models.mla")


def test_the_installed_mlx_lm_is_as_expected(tmp_path: Path) -> None:
    """Every use, on a real model: what a scheduled run against a newer mlx_lm shows first."""
    import mlx.core as mx

    folder = llama(tmp_path / "m")
    opened, config = upstream.load_model(
        folder, classes=upstream.default_classes(), overrides={"rope_theta": 5.0}, trusted=False
    )
    assert (config["model_type"], config["rope_theta"]) == ("llama", 5.0)
    assert len(opened.layers) == config["num_hidden_layers"]
    with pytest.raises(ValueError, match="Model type nothing not supported"):
        upstream.default_classes()({"model_type": "nothing"})
    tokenizer = upstream.load_tokenizer(folder, trusted=False)
    assert tokenizer.chat_template is not None
    assert tokenizer.decode(tokenizer.encode("a")).endswith("a")
    assert len(list(upstream.generate_step(opened, mx.array([1, 2, 3]), 5))) == 5
    last = list(upstream.stream_generate(opened, tokenizer, [1, 2, 3], 2))[-1]
    assert isinstance(last.text, str)
    assert last.prompt_tps > 0 < last.generation_tps
    cache = upstream.prompt_cache(opened)
    opened(mx.array([[1, 2, 3]]), cache=cache)
    assert len(cache) == 2
    assert all(entry.state[0].shape[:2] == (1, 2) for entry in cache)


def test_matrices_are_laid_out_as_expected() -> None:
    import mlx.core as mx

    switch, quantized_switch = upstream.switch_linears()
    stack = switch(64, 32, 4, bias=False)
    assert stack.weight.shape == (4, 32, 64)
    x = mx.random.normal((1, 1, 64))
    mx.eval(chosen := stack(x, mx.array([2])))
    assert mx.allclose(chosen.reshape(-1), (stack.weight[2] @ x.reshape(-1)), atol=1e-5)
    assert isinstance(stack.to_quantized(group_size=64, bits=4), quantized_switch)
    multi, quantized_multi = upstream.multi_linears()
    heads = multi(64, 32, 3)
    assert heads.weight.shape == (3, 32, 64)
    assert heads(mx.zeros((1, 3, 2, 64))).shape == (1, 3, 2, 32)
    assert heads(mx.zeros((1, 3, 2, 32)), transpose=False).shape == (1, 3, 2, 64)
    assert isinstance(heads.to_quantized(group_size=64, bits=4), quantized_multi)
