"""`hf-rotational plan`, from a folder with a config."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hf_rotational.commands import plan
from hf_rotational.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert")
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30)
    model = BertForMaskedLM(config)
    torch.nn.init.zeros_(model.bert.encoder.layer[0].output.dense.weight)
    model.save_pretrained(path)
    return str(path)


def run(*argv: str) -> None:
    parser = ArgumentParser()
    plan.register(parser.add_subparsers())
    arguments = parser.parse_args(["plan", *argv])
    arguments.run(arguments)


def row(text: str, name: str) -> str:
    (found,) = re.findall(rf"^{re.escape(name)} .*$", text, re.MULTILINE)
    return " ".join(str(found).split())


def test_prints_the_plan_of_the_config_alone(folder: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    run(str(tmp_path))
    text = capsys.readouterr().out
    assert text.startswith("BertForMaskedLM of ")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert row(text, name) == f"{name} Linear 16x24 0 yes: weight matrix"
    assert "Without weights" in text


def test_weights_tell_what_is_zero(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "--weights")
    text = capsys.readouterr().out
    assert row(text, "bert.encoder.layer.0.output.dense.weight").endswith(
        "yes: weight matrix, zero now: neurons that start at 0 take the plain step"
    )
    assert "Without weights" not in text


def test_options_reach_the_plan(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        folder,
        *("--architecture", "BertForSequenceClassification", "--include", "^classifier", "--exclude", "query", "key"),
        *("--embeddings", "--multiplier", "value=0.5", "intermediate=2"),
    )
    text = capsys.readouterr().out
    assert row(text, "classifier.weight").endswith("yes: included")
    assert row(text, "bert.encoder.layer.0.attention.self.key.weight").endswith("no: excluded")
    assert row(text, "bert.encoder.layer.0.attention.self.value.weight").endswith("yes: weight matrix, angle x 0.5")
    assert row(text, "bert.encoder.layer.0.intermediate.dense.weight").endswith("angle x 2")
    assert "yes" in row(text, "bert.embeddings.word_embeddings.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--architecture", "BertForNothing"), "'BertForNothing' is no model class of transformers"),
        (("--exclude", "decoder_x"), "exclude: 'decoder_x' matches no parameter"),
        (("--multiplier", "value"), "Invalid multipliers: 'value'"),
        (("--multiplier", "value=fast"), "Invalid multipliers: 'value=fast'"),
        (("--multiplier", "value=-1"), "Invalid multiplier: 'value': -1"),
    ],
)
def test_what_cannot_be_used_is_named(folder: str, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run(folder, *arguments)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config of a model at"):
        run(str(tmp_path))
