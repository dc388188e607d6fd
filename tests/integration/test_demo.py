"""`hf-rotational demo` from its arguments to the last line it prints, with a tiny model and few steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from hf_rotational.cli import main
from hf_rotational.monitor.records import read_records

STEPS = 6
WORDS = ("red", "green", "blue", "one", "two", "three")


def make_model(folder: Path) -> str:
    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def make_texts(file: Path) -> str:
    rows = [(f"{first} {second} {third}", first) for first in WORDS for second in WORDS for third in WORDS]
    file.write_text("sentence,word\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return str(file)


def demo(folder: Path, output_dir: str = "result", **more: object) -> None:
    arguments = {
        "model": make_model(folder / "tiny"),
        "train_file": make_texts(folder / "train.csv"),
        "text_column": "sentence",
        "label_column": "word",
        "output_dir": str(folder / output_dir),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        **more,
    }
    main(["demo", *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run; `printed.txt` in it holds its standard output."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, (folder / "printed.txt").open("w") as printed:
        patch.setattr(sys, "stdout", printed)
        demo(folder)
    return folder


@pytest.fixture
def result(folder: Path) -> Path:
    return folder / "result"


def test_the_folder_holds_a_checkpoint_and_what_is_told_of_it(result: Path) -> None:
    names = {str(file.relative_to(result)) for file in result.rglob("*")}
    assert names >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "rotation.jsonl",
        "tokenizer.json",
        "trainer_state.json",
        "training.png",
        "training_args.bin",
        "adamw/rotation.jsonl",
        "adamw/trainer_state.json",
    }
    assert (result / "training.png").read_bytes().startswith(b"\x89PNG")


def test_both_arms_saw_the_same_batches_and_took_all_steps(result: Path) -> None:
    logs = [
        [log["loss"] for log in json.loads(file.read_text())["log_history"] if "loss" in log]
        for file in (result / "trainer_state.json", result / "adamw" / "trainer_state.json")
    ]
    assert [len(losses) for losses in logs] == [STEPS, STEPS]
    assert logs[0][0] == logs[1][0]  # same weights, batch and dropout before either has moved
    assert logs[0][1:] != logs[1][1:]


def test_the_rotation_of_both_arms_was_measured(result: Path) -> None:
    rotational, adamw = (read_records(result / arm).steps for arm in (".", "adamw"))
    assert [record["step"] for record in rotational] == [record["step"] for record in adamw] == [*range(1, STEPS + 1)]
    assert all(record["target"] > 0 for record in rotational)
    assert all(record["target"] is None for record in adamw)


def test_the_table_and_the_record_agree(folder: Path, result: Path) -> None:
    printed = (folder / "printed.txt").read_text()
    runs = json.loads((result / "demo.json").read_text())["runs"]
    assert [run["steps"] for run in runs] == [STEPS, STEPS]
    for run in runs:
        (line,) = (line for line in printed.splitlines() if run["name"] in line)
        assert f"{run['validation_loss']:.3f}" in line
        assert f"{run['validation_accuracy']:.1%}" in line


def test_the_card_can_be_published(folder: Path, result: Path) -> None:
    card = ModelCard.load(result / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model is None  # a folder is nothing the Hub could link to
    (accuracy,) = card.data.eval_results
    runs = json.loads((result / "demo.json").read_text())["runs"]
    assert accuracy.metric_value == pytest.approx(runs[1]["validation_accuracy"], abs=1e-4)
    assert str(folder) not in card.content


def test_the_last_lines_load_the_model_without_this_package(folder: Path, tmp_path: Path) -> None:
    lines = (folder / "printed.txt").read_text().splitlines()[-3:]
    block = "import sys; sys.modules['hf_rotational'] = None"  # importing it now raises
    program = "\n".join([block, *lines])
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in WORDS


def test_a_second_run_replaces_the_first_and_a_strangers_folder_is_left_alone(
    folder: Path, result: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (result / "trainer_state.json").stat().st_mtime_ns
    demo(folder)
    assert (result / "trainer_state.json").stat().st_mtime_ns > first
    with pytest.raises(SystemExit) as exit_:
        demo(folder, output_dir="tiny")
    assert exit_.value.code == 2
    assert "--output_dir" in capsys.readouterr().err


def test_more_tokens_than_the_model_reads_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        demo(folder, output_dir=str(tmp_path / "never"), max_length=65)
    assert "--max_length 65: this model reads 64 tokens at most." in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
