"""Tiny runs, trained or put together, and what is asked of everything that is published of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_rotational import RotationalTrainer, RotationalTrainingArguments
from tests.hub.loopback import TOKEN, Repository, metadata_errors
from tests.monitored import BETAS, LR, WEIGHT_DECAY, write_run

SETTINGS = {"lr": LR, "weight_decay": WEIGHT_DECAY, "betas": list(BETAS), "rotational": True, "rotation": "equilibrium"}
HEADER = {
    "settings": SETTINGS,
    "summary": "8 of 11 tensors rotate: 10 of 20 parameters (50.0%)",
    "base_model": "owner/base",
    "datasets": ["owner/data"],
}


def model() -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{place}": place for place in range(40)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")


def dataset() -> Dataset:
    rows = [[(7 * row + column) % 40 for column in range(6)] for row in range(32)]
    return Dataset.from_dict({"input_ids": rows, "labels": [row[0] % 2 for row in rows]})


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(output_dir: Path, cls: type[Trainer] = RotationalTrainer, **settings: Any) -> Any:
    """Takes six steps, saves and evaluates after the third and the last. Has paths and a token in its arguments."""
    arguments = RotationalTrainingArguments if issubclass(cls, RotationalTrainer) else TrainingArguments
    defaults = {
        "output_dir": str(output_dir),
        "learning_rate": 1e-3,
        "max_steps": 6,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "load_best_model_at_end": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "hub_token": TOKEN,
        "optim": "rotational_adamw",
        "rotation_logging_steps": 1,
    }
    return cls(
        model=model(),
        args=arguments(**{**defaults, **settings}),
        train_dataset=dataset(),
        eval_dataset=dataset(),
        processing_class=tokenizer(),
        compute_metrics=accuracy,
    )


def finished_run(folder: Path, **header: Any) -> Path:
    """An output directory as a monitored run leaves it, with losses, accuracy, and what must not get out."""
    write_run(folder, depth=1, **{**HEADER, **header})
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"].append({"step": 60, "eval_loss": 2.125, "eval_accuracy": 0.75, "eval_runtime": 1.0})
    state["best_model_checkpoint"] = str(folder / "checkpoint-60")
    (folder / "trainer_state.json").write_text(json.dumps(state))
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    args = RotationalTrainingArguments(str(folder), hub_token=TOKEN, use_cpu=True, deepspeed=None, learning_rate=LR)
    torch.save(args, folder / "training_args.bin")
    (folder / "notes.txt").write_text(f"{TOKEN} {folder}")
    return folder


def assert_publishable(repository: Repository, run_dir: Path) -> None:
    """No token and no path of this machine in any file, and a card that the Hub takes."""
    for name, content in repository.files.items():
        for secret in (TOKEN, str(run_dir), str(run_dir.parent), str(Path.home())):
            # /root is part of other words.
            assert len(Path(secret).parts) == 2 or secret.encode() not in content, (name, secret)
    assert metadata_errors(repository.files["README.md"].decode()) == []
    assert not any(name.endswith("training_args.bin") for name in repository.files)
