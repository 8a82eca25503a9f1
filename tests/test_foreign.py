"""Checkpoints that other tools quantized: read where mlx_lm reads them, refused clearly where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlxq.architecture.inspection import inspect_model
from mlxq.architecture.opening import open_lazily
from mlxq.cli import app
from mlxq.errors import BadInputError
from mlxq.metrics.evaluation import evaluation_model
from mlxq.pipeline import prepare
from mlxq.planning.plan import Stored
from mlxq.recipe.load import load_recipe, recipe_from_dict
from mlxq.show.plan_tables import plan_notes
from mlxq.sources.resolve import resolve
from tests.checkpoints import LLAMA, build, save
from tests.test_bit_identity import CONFIGS, SMALL, assert_same_bits, quantize, tensors

CAST = recipe_from_dict({}, "mlx")


def rewritten(folder: Path, quantization: dict[str, Any], weights: dict[str, mx.array]) -> Path:
    """A checkpoint that says it is quantized by another tool."""
    return save(folder, {**LLAMA, "torch_dtype": "float16", "quantization_config": quantization}, weights)


def awq(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A 4-bit AutoAWQ checkpoint with random codes, and the values its linear layers stand for."""
    _, weights = build({**LLAMA, "torch_dtype": "float16"})
    order, generator = [0, 2, 4, 6, 1, 3, 5, 7], np.random.default_rng(0)
    stored: dict[str, mx.array] = {}
    values: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        module = name.removesuffix(".weight")
        if "proj" not in name:
            stored[name] = array
            continue
        rows, columns = array.shape
        codes = generator.integers(0, 16, (columns, rows))
        zeros = generator.integers(0, 16, (columns // 64, rows))
        scales = (generator.random((columns // 64, rows)) * 0.01 + 0.005).astype(np.float16)

        def pack(numbers: np.ndarray) -> mx.array:
            eights = numbers.reshape(numbers.shape[0], -1, 8)[..., order].astype(np.uint32)
            return mx.array((eights << (4 * np.arange(8, dtype=np.uint32))).sum(-1).astype(np.uint32).view(np.int32))

        stored[f"{module}.qweight"], stored[f"{module}.qzeros"] = pack(codes), pack(zeros)
        stored[f"{module}.scales"] = mx.array(scales)
        spread = np.repeat(np.arange(columns // 64), 64)
        values[module] = ((codes - zeros[spread]) * scales[spread].astype(np.float32)).T
    return rewritten(folder, {"quant_method": "awq", "bits": 4, "group_size": 64}, stored), values


def test_awq_is_carried_over_as_mlx_lm_reads_it(tmp_path: Path) -> None:
    model, _ = awq(tmp_path / "model")
    quantize(model, tmp_path / "ours", CAST)
    loaded, _ = mlx_lm.load(str(tmp_path / "ours"))
    theirs, _ = mlx_lm.load(str(model))
    ids = mx.array([[3, 4, 5]])
    assert mx.array_equal(loaded(ids), theirs(ids)).item()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"]["group_size"] == 64


def test_what_stays_in_a_foreign_format_is_said(tmp_path: Path) -> None:
    model, _ = awq(tmp_path / "model")
    plan = prepare(load_recipe("8bit"), resolve(str(model)))
    assert any("14 modules stay as the source has them quantized (14 in 4:64)" in line for line in plan_notes(plan))
    opened = prepare(load_recipe("8bit"), resolve(str(model)), Stored.REQUANTIZE)
    assert not plan_notes(opened)
    assert {str(d.format) for d in opened.decisions} == {"8:64"}


def test_requantizing_starts_from_the_values(tmp_path: Path) -> None:
    model, values = awq(tmp_path / "model")
    quantize(model, tmp_path / "plain", CAST, Stored.DEQUANTIZE)
    written = tensors(tmp_path / "plain")
    for module, expected in values.items():
        found = np.asarray(written[f"{module}.weight"].astype(mx.float32))
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_quantized_mlx_model_is_refused_with_a_way_on(tmp_path: Path) -> None:
    model = save(tmp_path / "model", SMALL, build(SMALL)[1])
    quantize(model, tmp_path / "first", load_recipe("8bit"))
    with pytest.raises(BadInputError, match="already quantized for MLX") as caught:
        prepare(load_recipe("4bit"), resolve(str(tmp_path / "first")))
    assert "--requantize" in str(caught.value.hint)
    plan = prepare(load_recipe("4bit"), resolve(str(tmp_path / "first")), Stored.REQUANTIZE)
    assert {str(d.format) for d in plan.decisions} == {"4:64"}


DEEPSEEK: dict[str, Any] = {
    **CONFIGS["deepseek_v2_mla"], "model_type": "deepseek_v3", "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "rope_scaling": None, "qk_nope_head_dim": 64,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **SMALL, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64,
    "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


def deepseek_weights() -> dict[str, mx.array]:
    """DeepSeek V3 as published: an expert a tensor, and one projection for keys and values."""
    found: dict[str, mx.array] = {}
    for path, array in build(DEEPSEEK)[1].items():
        prefix, _, rest = path.partition(".switch_mlp.")
        if rest:
            found.update({f"{prefix}.experts.{i}.{rest}": mx.contiguous(array[i]) for i in range(array.shape[0])})
        elif not path.endswith(("embed_q.weight", "unembed_out.weight")):
            found[path] = array
    for layer in range(DEEPSEEK["num_hidden_layers"]):
        joined = (mx.random.normal((4 * (64 + 32), 64)) * 0.1).astype(mx.bfloat16)
        found[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = joined
    return found


def deepseek_fp8(folder: Path) -> Path:
    """FP8 in blocks of 128x128, as DeepSeek publishes it; the last block of a width may be narrower."""
    stored: dict[str, mx.array] = {}
    for name, array in deepseek_weights().items():
        if "_proj" not in name:
            stored[name] = array
            continue
        blocks = [-(-n // 128) for n in array.shape]
        stored[name] = mx.to_fp8(array * 100)
        stored[f"{name}_scale_inv"] = mx.random.uniform(0.005, 0.02, blocks)
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return as_fp8(save(folder, {**DEEPSEEK, "quantization_config": said}, stored))


def as_fp8(folder: Path) -> Path:
    """Give every U8 tensor of a checkpoint the dtype it stands for; MLX itself cannot write it."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    changed = raw.replace(b'"dtype":"U8"', b'"dtype":"F8_E4M3"')
    grown = len(changed) - len(raw)
    size = int.from_bytes(raw[:8], "little") + grown
    file.write_bytes(size.to_bytes(8, "little") + changed[8:])
    return folder


def deepseek_int4(folder: Path) -> Path:
    """compressed-tensors, packed symmetric int4 in groups of 32, on the experts (as Kimi K2 Thinking has it)."""
    stored: dict[str, mx.array] = {}
    for name, array in deepseek_weights().items():
        if ".experts." not in name:
            stored[name] = array
            continue
        rows, columns = array.shape
        module = name.removesuffix(".weight")
        stored[f"{module}.weight_packed"] = mx.random.randint(0, 2**31 - 1, (rows, columns // 8)).astype(mx.int32)
        stored[f"{module}.weight_scale"] = mx.random.uniform(0.005, 0.02, (rows, columns // 32)).astype(mx.bfloat16)
        stored[f"{module}.weight_shape"] = mx.array([rows, columns])
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return save(folder, {**DEEPSEEK, "quantization_config": said}, stored)


def gpt_oss(folder: Path) -> Path:
    """MXFP4 as OpenAI publishes it: blocks of 16 bytes with an exponent each, gate and up rows interleaved."""
    stored: dict[str, mx.array] = {}
    for name, array in build(GPT_OSS)[1].items():
        if ".experts." not in name:
            stored[name] = array
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for part, rows, columns in (("gate_up_proj", 128, 128), ("down_proj", 128, 64)):
            stored[f"{experts}.{part}_blocks"] = mx.random.randint(0, 256, (4, rows, columns // 32, 16)).astype(
                mx.uint8
            )
            stored[f"{experts}.{part}_scales"] = mx.random.randint(110, 122, (4, rows, columns // 32)).astype(mx.uint8)
            stored[f"{experts}.{part}_bias"] = mx.random.normal((4, rows)).astype(mx.bfloat16)
    return save(folder, {**GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}, stored)


def bitnet(folder: Path) -> Path:
    """Ternary weights, four to a byte along the outputs, with one scale each."""
    stored: dict[str, mx.array] = {}
    for name, array in build(SMALL)[1].items():
        if "_proj" not in name:
            stored[name] = array
            continue
        stored[name] = mx.random.randint(0, 256, (array.shape[0] // 4, array.shape[1])).astype(mx.uint8)
        stored[f"{name}_scale"] = mx.array([1.5], dtype=mx.bfloat16)
    said = {"quant_method": "bitnet", "linear_class": "autobitlinear", "modules_to_not_convert": ["lm_head"]}
    return save(folder, {**SMALL, "quantization_config": said}, stored)


def awq_only(folder: Path) -> Path:
    """The checkpoint of ``awq`` alone."""
    return awq(folder)[0]


READABLE = {
    "awq": awq_only, "deepseek_fp8": deepseek_fp8, "deepseek_int4": deepseek_int4, "gpt_oss": gpt_oss, "bitnet": bitnet,
}  # fmt: skip


def parameters(folder: Path) -> dict[str, mx.array]:
    """Every parameter of a folder, as ``mlx_lm`` opens it."""
    return dict(tree_flatten(mlx_lm.load(str(folder))[0].parameters()))


@pytest.mark.parametrize("kind", READABLE)
def test_convert_carries_over_what_mlx_lm_reads(kind: str, tmp_path: Path) -> None:
    model = READABLE[kind](tmp_path / "model")
    quantize(model, tmp_path / "ours", CAST)
    theirs, ours = parameters(model), parameters(tmp_path / "ours")
    assert sorted(ours) == sorted(theirs)
    for path, array in ours.items():
        assert array.dtype == theirs[path].dtype, path
        assert mx.array_equal(array, theirs[path]).item(), path


@pytest.mark.parametrize("kind", sorted(READABLE.keys() - {"bitnet"}))
def test_dequantizing_gives_the_values_mlx_lm_uses(kind: str, tmp_path: Path) -> None:
    model = READABLE[kind](tmp_path / "model")
    quantize(model, tmp_path / "plain", CAST, Stored.DEQUANTIZE)
    theirs, _ = mlx_lm.load(str(model))
    written = parameters(tmp_path / "plain")
    opened = 0
    for path, module in tree_flatten(theirs.leaf_modules(), is_leaf=nn.Module.is_module):
        if "scales" not in module:
            continue
        opened += 1
        found = written[f"{path}.weight"]
        values = mx.dequantize(
            module["weight"],
            scales=module["scales"],
            biases=module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            dtype=found.dtype,
        )
        assert mx.array_equal(found, values).item(), path
    assert opened or kind == "deepseek_fp8"
    assert not any(path.endswith(".scales") for path in written)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_fp8_is_quantized_from_the_values_mlx_lm_reads(tmp_path: Path) -> None:
    model = deepseek_fp8(tmp_path / "model")
    quantize(model, tmp_path / "ours", load_recipe("4bit"))
    mlx_lm.convert(str(model), str(tmp_path / "theirs"), quantize=True, q_bits=4, q_group_size=64)
    assert_same_bits(tmp_path / "ours", tmp_path / "theirs")


def test_mxfp4_experts_stay_and_the_rest_is_quantized(tmp_path: Path) -> None:
    model = gpt_oss(tmp_path / "model")
    quantize(model, tmp_path / "ours", load_recipe("8bit"))
    recorded = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"]
    assert recorded["model.layers.0.mlp.experts.gate_proj"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    ours, theirs = parameters(tmp_path / "ours"), parameters(model)
    path = "model.layers.1.mlp.experts.down_proj.weight"
    assert mx.array_equal(ours[path], theirs[path]).item()
    assert ours["model.layers.0.self_attn.q_proj.weight"].dtype == mx.uint32


@pytest.mark.parametrize(
    ("mode", "said", "beside"),
    [
        ("mxfp4", {"quant_method": "mxfp4"}, False),
        ("mxfp8", {"quant_method": "mxfp8"}, False),
        ("mxfp8", {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}, False),
        ("nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, False),
        ("nvfp4", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}, "quant_method": "modelopt"}, True),
        ("nvfp4", {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, False),
        ("mxfp4", {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}, False),
    ],
)
def test_microscaled_floats_are_taken_over_as_they_are(
    mode: str, said: dict[str, Any], beside: bool, tmp_path: Path
) -> None:
    """Tensors under MLX's names, with the formats said as other tools say them."""
    model, _ = build(SMALL)
    model, _ = mlx_lm.utils.quantize_model(model, SMALL, None, None, mode=mode)
    config = SMALL if beside else {**SMALL, "quantization_config": said}
    folder = save(tmp_path / "model", config, dict(tree_flatten(model.parameters())))
    if beside:
        (folder / "hf_quant_config.json").write_text(json.dumps(said))
    quantize(folder, tmp_path / "ours", CAST)
    ours, theirs = parameters(tmp_path / "ours"), parameters(folder)
    assert all(mx.array_equal(array, theirs[path]).item() for path, array in ours.items())
    recorded = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert recorded["quantization"]["mode"] == mode
    assert recorded["quantization"] == recorded["quantization_config"]
    assert not (tmp_path / "ours" / "hf_quant_config.json").exists()
    found = inspect_model(resolve(str(folder)), context=128).quantization
    assert found is not None
    assert found.method == said["quant_method"]


def test_bitnet_cannot_be_quantized_or_opened(tmp_path: Path) -> None:
    model = bitnet(tmp_path / "model")
    for recipe, stored in ((load_recipe("4bit"), Stored.AS_IS), (CAST, Stored.DEQUANTIZE)):
        with pytest.raises(BadInputError, match="bitnet") as caught:
            prepare(recipe, resolve(str(model)), stored)
        assert "mlxq convert" in str(caught.value.hint)


@pytest.mark.parametrize("only", [None, "switch_mlp.up_proj"])
def test_scales_for_whole_tensors_are_kept_and_recorded(only: str | None, tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]
    model, _ = build(config)
    model, config = mlx_lm.utils.quantize_model(
        model, config, 16, 4, "nvfp4", global_scale=True, quant_predicate=lambda path, _: only is None or only in path
    )
    folder = save(tmp_path / "model", config, dict(tree_flatten(model.parameters())))
    finished = quantize(folder, tmp_path / "ours", CAST)
    ours, theirs = parameters(tmp_path / "ours"), parameters(folder)
    assert any(path.endswith("global_scale") for path in ours)
    assert all(mx.array_equal(array, theirs[path]).item() for path, array in ours.items())
    assert finished.report["metrics"]["parameter_count"] == sum(a.size for a in build(CONFIGS["qwen3_moe"])[1].values())


def test_scales_for_whole_tensors_are_opened(tmp_path: Path) -> None:
    config = CONFIGS["qwen3_moe"]
    model, config = mlx_lm.utils.quantize_model(build(config)[0], config, 16, 4, mode="nvfp4", global_scale=True)
    folder = save(tmp_path / "model", config, dict(tree_flatten(model.parameters())))
    quantize(folder, tmp_path / "plain", CAST, Stored.DEQUANTIZE)
    plain = parameters(tmp_path / "plain")
    assert sorted(plain) == sorted(build(CONFIGS["qwen3_moe"])[1])
    stack = model.model.layers[0].mlp.switch_mlp.down_proj
    for expert in range(stack.weight.shape[0]):
        scale = stack["global_scale"].reshape(-1)[expert]
        stored = stack.weight[expert], stack.scales[expert]
        numbers = mx.dequantize(*stored, global_scale=scale, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
        ours = plain["model.layers.0.mlp.switch_mlp.down_proj.weight"][expert]
        assert mx.allclose(ours.astype(mx.float32), numbers, rtol=1e-2)
    evaluated = evaluation_model(open_lazily(folder, "model")[0])(mx.array([[1, 2, 3]]))
    assert mx.allclose(
        evaluated,
        evaluation_model(open_lazily(tmp_path / "plain", "plain")[0])(mx.array([[1, 2, 3]])),
        rtol=0.1,
        atol=0.1,
    )


@pytest.mark.parametrize("kind", READABLE)
def test_inspect_and_a_dry_run_say_what_is_in_it(kind: str, tmp_path: Path) -> None:
    model = READABLE[kind](tmp_path / "model")
    method = json.loads((model / "config.json").read_text())["quantization_config"]["quant_method"]
    found = inspect_model(resolve(str(model)), context=128)
    assert found.quantization is not None
    assert found.quantization.method == method
    assert found.parameters == prepare(CAST, resolve(str(model))).parameter_count
    shown = CliRunner().invoke(app, ["inspect", str(model)])
    assert shown.exit_code == 0, shown.output
    assert method in shown.stdout


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        {"quant_method": "gptq", "bits": 3, "group_size": 64},
    ],
)
def test_what_mlx_lm_cannot_read_is_refused(tmp_path: Path, quantization: dict[str, Any]) -> None:
    model = rewritten(tmp_path / "model", quantization, build({**LLAMA, "torch_dtype": "float16"})[1])
    with pytest.raises(BadInputError, match=quantization["quant_method"]) as caught:
        prepare(load_recipe("4bit"), resolve(str(model)))
    assert caught.value.hint


def test_gptq_is_refused_for_its_group_indices(tmp_path: Path) -> None:
    """AutoGPTQ always stores ``g_idx``, and packs along the inputs."""
    stored: dict[str, mx.array] = {}
    for name, array in build({**LLAMA, "torch_dtype": "float16"})[1].items():
        if "proj" not in name:
            stored[name] = array
            continue
        rows, columns = array.shape
        module = name.removesuffix(".weight")
        stored[f"{module}.qweight"] = mx.zeros((columns // 8, rows), dtype=mx.int32)
        stored[f"{module}.qzeros"] = mx.zeros((columns // 64, rows // 8), dtype=mx.int32)
        stored[f"{module}.scales"] = mx.ones((columns // 64, rows), dtype=mx.float16)
        stored[f"{module}.g_idx"] = mx.arange(columns) // 64
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
    model = rewritten(tmp_path / "model", said, stored)
    assert inspect_model(resolve(str(model)), context=128).parameters == sum(a.size for a in build(LLAMA)[1].values())
    with pytest.raises(BadInputError, match="g_idx") as caught:
        prepare(CAST, resolve(str(model)))
    assert "dequantize it" in str(caught.value.hint)
    for indices in [name for name in stored if name.endswith("g_idx")]:
        del stored[indices]
    with pytest.raises(BadInputError, match="gptq"):
        prepare(CAST, resolve(str(rewritten(tmp_path / "without", said, stored))))


def test_fp8_that_the_model_file_reads_as_integers_is_refused(tmp_path: Path) -> None:
    config = {
        **SMALL, "model_type": "ministral3", "sliding_window": None, "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "llama_4_scaling_beta": 0.1,
                            "original_max_position_embeddings": 512},
        "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"},
    }  # fmt: skip
    stored: dict[str, mx.array] = {}
    for name, array in build(config)[1].items():
        stored[name] = mx.to_fp8(array) if "_proj" in name else array
        if "_proj" in name:
            stored[f"{name}_scale_inv"] = mx.array(0.01, dtype=mx.bfloat16)
    model = as_fp8(save(tmp_path / "model", config, stored))
    with pytest.raises(BadInputError, match="misreads") as caught:
        prepare(CAST, resolve(str(model)))
    assert "bfloat16" in str(caught.value.hint)


@pytest.mark.parametrize("said", [None, {"quant_method": "fp8", "weight_block_size": [128, 128]}])
def test_packed_weights_without_scales_are_refused(said: dict[str, Any] | None, tmp_path: Path) -> None:
    stored = {n: mx.to_fp8(a) if "_proj" in n else a for n, a in build(SMALL)[1].items()}
    config = {**SMALL, "quantization_config": said} if said else SMALL
    model = as_fp8(save(tmp_path / "model", config, stored))
    with pytest.raises(BadInputError, match="F8_E4M3") as caught:
        prepare(CAST, resolve(str(model)))
    assert "bfloat16" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("said", "part"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "weight_scale_inv"),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "weight_scale"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "weight_global_scale"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "weight_scale_2"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "SCB"),
        ({"quant_method": "hqq"}, "W_q"),
        ({"quant_method": "eetq"}, "weight_scales"),
    ],
)
def test_helpers_that_mlx_lm_does_not_know_are_refused(said: dict[str, Any], part: str, tmp_path: Path) -> None:
    _, weights = build({**LLAMA, "torch_dtype": "float16"})
    weights["model.layers.0.mlp.up_proj." + part] = mx.ones((1,))
    model = rewritten(tmp_path / "model", said, weights)
    with pytest.raises(BadInputError, match=said["quant_method"]) as caught:
        prepare(load_recipe("4bit"), resolve(str(model)))
    assert "bfloat16" in str(caught.value.hint)
    shown = CliRunner().invoke(app, ["inspect", str(model)])
    assert shown.exit_code == 0, shown.output
    assert said["quant_method"] in shown.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "up_proj"),
        (lambda w: w.update({"model.layers.1.mlp.surprise.weight": mx.zeros((2, 2))}), "surprise"),
        (lambda w: w.update({"lm_head.weight": mx.zeros((3, 128))}), "lm_head"),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path: Path, change: Any, said: str) -> None:
    _, weights = build(LLAMA)
    change(weights)
    model = save(tmp_path / "model", LLAMA, weights)
    with pytest.raises(BadInputError) as caught:
        prepare(load_recipe("4bit"), resolve(str(model)))
    assert said in caught.value.message


def test_an_unknown_architecture_and_foreign_code_are_refused(tmp_path: Path) -> None:
    _, weights = build(LLAMA)
    model = save(tmp_path / "unknown", {**LLAMA, "model_type": "never_seen"}, weights)
    with pytest.raises(BadInputError, match="never_seen"):
        prepare(CAST, resolve(str(model)))
    model = save(tmp_path / "code", {**LLAMA, "model_file": "model.py"}, weights)
    (model / "model.py").write_text("raise SystemExit('ran')")
    with pytest.raises(BadInputError, match=r"model\.py") as caught:
        prepare(CAST, resolve(str(model)))
    assert "--trust-remote-code" in str(caught.value.hint)
