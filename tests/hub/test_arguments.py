"""Training arguments are read without running them, and leave tokens and paths at home."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hf_rotational import RotationalTrainingArguments
from hf_rotational.hub.arguments import published_arguments, without_paths

TOKEN = "hf_" + "x" * 32


def test_values_survive_and_secrets_do_not(tmp_path: Path) -> None:
    args = RotationalTrainingArguments(
        output_dir=str(tmp_path / "run"),
        resume_from_checkpoint="/data/runs/old/checkpoint-5",
        hub_token=TOKEN,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        report_to=["none"],
        rotation_multipliers=["mlp=2"],
        logging_strategy="epoch",
        fsdp_config={"min_num_params": 3},
        use_cpu=True,
    )
    torch.save(args, tmp_path / "training_args.bin")
    published = published_arguments(tmp_path)
    text = json.dumps(published)
    assert TOKEN not in text
    assert "hub_token" not in published
    assert str(tmp_path) not in text
    assert "/data" not in text
    expected = {
        "output_dir": "run",
        "resume_from_checkpoint": "checkpoint-5",
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "logging_strategy": "epoch",
        "rotation_multipliers": ["mlp=2"],
        "optim": "rotational_adamw",
        "seed": 42,
    }
    assert {name: published.get(name) for name in expected} == expected


class Arguments(TrainingArguments):
    """Cannot be imported by the process that reads it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (_ran, (str(self.output_dir),), {"learning_rate": 0.5})


def _ran(folder: str) -> object:
    Path(folder, "ran").touch()
    return object()


def test_nothing_that_is_pickled_is_run(tmp_path: Path) -> None:
    torch.save(Arguments(str(tmp_path), use_cpu=True), tmp_path / "training_args.bin")
    assert published_arguments(tmp_path) == {"learning_rate": 0.5}
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [None, b"", b"no archive", pickle.dumps({"a": 1})])
def test_what_cannot_be_read_is_left_out(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "training_args.bin").write_bytes(content)
    assert published_arguments(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("base_model: /home/me/models/base", "base_model: base"),
        ("(/a/b), '/c/d/', `/e/f.txt`", "(b), 'd', `f.txt`"),
        ("base_model:adapter:/a/b/c", "base_model:adapter:c"),
        (r"C:\Users\me\run and D:/data/x", "run and x"),
        ("https://huggingface.co/owner/base", "https://huggingface.co/owner/base"),
        ("owner/base ./a/b ../a/b ~/a/b and/or </div> 1/2 / /", "owner/base ./a/b ../a/b ~/a/b and/or </div> 1/2 / /"),
    ],
)
def test_paths_in_a_text(text: str, without: str) -> None:
    assert without_paths(text) == without
