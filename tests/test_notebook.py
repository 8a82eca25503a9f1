"""docs/quickstart.ipynb, run from the first cell to the last on a small stand-in for its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests import checkpoints
from tests.documents import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]


def test_it_is_kept_without_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not cell.metadata


def test_its_model_is_named_once(notebook: Any) -> None:
    naming = [cell.source for cell in notebook.cells if cell.cell_type == "code" and "sample" in cell.source]
    assert len(naming) == 1
    assert 'MODEL = os.environ.get("MLXQ_NOTEBOOK_MODEL", "sample")' in naming[0]


def byte_level(folder: Path) -> Path:
    """A Llama whose tokenizer has a token for each byte, so that every text decodes to itself."""
    checkpoints.llama(folder, hidden_size=64, intermediate_size=64, vocab_size=259, num_hidden_layers=1)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def shown(cell: Any) -> str:
    """What a notebook shows of a cell's outputs: the richest form of each."""
    forms = [{"text/plain": output.get("text", ""), **output.get("data", {})} for output in cell.outputs]
    return "".join(form.get("text/html") or form["text/plain"] for form in forms)


# What the kernel's own packages warn of is not ours.
@pytest.mark.filterwarnings("default")
def test_every_cell_runs_and_shows_what_it_says(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = byte_level(tmp_path / "model")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MLXQ_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("MLXQ_NOTEBOOK_MODEL", str(model))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = {cell["id"]: shown(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert "<table>" in cells["inspect"]
    assert "model.layers.0.mlp.down_proj" in cells["layer"]
    assert "Why is the sky blue?" in cells["round-trip"]
    assert "6:64" in cells["plan"]
    assert "6:64" in cells["quantize"]
    assert "'bits': 6" in cells["config"]
    assert cells["compare"].count("<svg") == 1
    assert cells["compare"].count("Why is the sky blue?") == 1
    assert cells["metrics"].count("tokens/s") == 4
    assert cells["spend"].count("<svg") == 1
    assert cells["curve"].count("chosen") == 1
    assert "afternoon-best" in cells["again"]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = [output["text"] for output in outputs if output.get("name") == "stderr"]
    # Of a package that draws bars in notebooks, where it finds no ipywidgets.
    assert not [text for text in said if "IProgress not found" not in text]
