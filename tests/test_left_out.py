"""What the source has and the output has not is said: in the plan, in ``mlxq.json`` and on the card."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlxq.architecture.left_out import left_out
from mlxq.cli import app
from mlxq.families import FAMILIES, Family, part_of
from mlxq.tensors import TensorSpec
from tests.checkpoints import LLAMA, build, save

LAYER = "model.layers.0.mlp.up_proj.weight"


def found(*names: str, parameters: tuple[str, ...] = (LAYER,), layers: int = 1) -> dict[str, int]:
    checkpoint = {name: TensorSpec(name, "F32", (2,)) for name in names}
    taken = checkpoint.keys() & set(parameters)
    return {part.label: part.nbytes for part in left_out(checkpoint, parameters, taken, layers)}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("visual.blocks.0.attn.qkv.weight", "vision tower"),
        ("language_model.vision_tower.patch_embed.weight", "vision tower"),
        ("multi_modal_projector.linear_1.weight", "image projector"),
        ("model.audio_tower.conv.weight", "audio tower"),
        ("mtp.layers.0.mlp.up_proj.weight", "prediction head"),
        ("model.mtp_block.0.weight", "prediction head"),
        ("model.layers.1.eh_proj.weight", "prediction head"),
        ("lm_head.weight", "head of its own, as the embedding is the head"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "buffers, which are computed anew"),
    ],
)
def test_each_part_by_its_name(name: str, label: str) -> None:
    assert found(LAYER, name) == {label: 8}


def test_what_the_model_has_is_not_left_out() -> None:
    assert found(LAYER) == {}
    # Assembled from others, in the language model and in a tower that the model keeps.
    assert found("model.layers.0.mlp.experts.0.w1.weight", LAYER) == {}
    tower = "vision_tower.conv.weight"
    assert found(LAYER, tower, "vision_tower.old.weight", parameters=(LAYER, tower)) == {}
    assert found(LAYER, "lm_head.qweight", parameters=(LAYER, "lm_head.weight")) == {}
    assert found(LAYER, "model.layers.1.mlp.up_proj.weight", parameters=(LAYER,), layers=2) == {}


def test_several_tensors_of_a_part_are_one_line() -> None:
    checkpoint = {name: TensorSpec(name, "BF16", (1000, 1000)) for name in ("visual.b.weight", "visual.a.weight")}
    (part,) = left_out(checkpoint, [LAYER], [], 1)
    assert str(part) == (
        "left out: vision tower (2 tensors, 4.0 MB, such as visual.a.weight); "
        "what is written reads and writes text only"
    )


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.visualize", "lm_head", "model.mtproj"])
def test_the_language_model_is_no_part(name: str) -> None:
    assert part_of(name) is None


def vision_model(folder: Path) -> Path:
    """A Qwen2-VL checkpoint: its language model, and a tower that mlx-lm's model file throws away."""
    text = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}
    _, weights = build(text)
    config = {**text, "model_type": "qwen2_vl", "text_config": text, "vision_config": {"hidden_size": 8}}
    weights = {**weights, "visual.blocks.0.weight": mx.zeros((8, 8), dtype=mx.bfloat16)}
    save(folder, config, weights)
    (folder / "README.md").write_text("---\nlicense: mit\npipeline_tag: image-text-to-text\n---\n# It sees\n")
    return folder


def test_a_dropped_tower_is_in_the_plan_the_report_and_on_the_card(tmp_path: Path) -> None:
    source = vision_model(tmp_path / "m")
    arguments = ["quantize", "4bit", "--model", str(source)]
    plan = json.loads(CliRunner().invoke(app, [*arguments, "--dry-run", "--json"]).stdout)
    (part,) = plan["left_out"]
    assert (part["label"], part["tensors"], part["nbytes"], part["ability"]) == ("vision tower", 1, 128, True)
    assert any("vision tower" in note for note in plan["notes"])
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*arguments, "-o", str(out), "--no-generate"])
    assert done.exit_code == 0
    report = json.loads((out / "mlxq.json").read_text())
    assert report["left_out"] == plan["left_out"]
    card = (out / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card
    assert "left out: vision tower" in card


def test_a_family_row_differs_from_what_unknown_models_are() -> None:
    """A row that says nothing is no fact."""
    assert [name for name, family in FAMILIES.items() if family == Family()] == []


def test_families_are_models_that_mlx_lm_has_or_language_models_of_such() -> None:
    import importlib.util

    from mlx_lm.utils import MODEL_REMAPPING

    nested = {"gemma3n_text"}
    for name in FAMILIES.keys() - nested:
        assert importlib.util.find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(name, name)}"), name
