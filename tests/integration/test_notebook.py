"""The notebook runs from top to bottom, and what is stored with it is what a run prints."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_rotational.monitor.records import read_records

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "introduction.ipynb"
STEPS = 4


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def settings(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell with the settings."""
    return next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))


def put_tiny_model(folder: Path) -> None:
    words = ("return", "the", "class", "of", "a", "message", "for", "test")
    vocabulary = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=64)).save_pretrained(folder)


def test_it_runs_from_top_to_bottom(
    notebook: nbformat.NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = settings(notebook)
    (model,) = re.findall(r'^MODEL = "(.+)"$', cell.source, re.M)
    put_tiny_model(tmp_path / model)  # a folder of that name goes before the Hub
    cell.source = re.sub(r"^STEPS = \d+$", f"STEPS = {STEPS}", cell.source, flags=re.M)
    command = tmp_path / "bin" / "hf-rotational"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from hf_rotational.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()

    for optim in ("adamw_torch", "rotational_adamw"):
        assert [record["step"] for record in read_records(tmp_path / "out" / optim).steps] == [*range(1, STEPS + 1)]
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("same logits: True" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)


def test_what_is_stored_is_one_run_without_errors_or_paths(notebook: nbformat.NotebookNode) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    for output in outputs:
        assert output.get("name", "stdout") == "stdout"
        assert not re.search(r"/(home|root|tmp|usr|Users|work)/", output.get("text", ""))
    assert NOTEBOOK.stat().st_size < 200_000
