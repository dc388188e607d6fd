"""A run that is killed again and again ends with the weights of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, set_seed

from hf_rotational import RotationalTrainer, RotationalTrainingArguments
from hf_rotational.training.checkpoint import last_complete_checkpoint
from tests.helpers import copies, exactly_equal

STEPS = 60
SETTINGS: dict[str, dict[str, Any]] = {
    "gains": {"rotation_gains": "learned"},
    "standardized": {"weight_standardization": "function_preserving", "optim": "adamw_torch"},
}


def trainer(folder: Path, setting: str) -> RotationalTrainer:
    set_seed(0)
    rows = [[(7 * row + column) % 40 for column in range(6)] for row in range(64)]
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=40
    )  # with dropout, whose random numbers a checkpoint keeps
    return RotationalTrainer(
        model=BertForSequenceClassification(config),
        args=RotationalTrainingArguments(
            output_dir=str(folder),
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            max_steps=STEPS,
            save_steps=2,
            save_total_limit=3,
            logging_steps=1,
            rotation_logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **SETTINGS[setting],
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": [row[0] % 2 for row in rows]}),
    )


def saved(folder: Path) -> int:
    """Step of the last complete checkpoint; 0 without one."""
    try:
        return int(last_complete_checkpoint(folder).name.split("-")[1])
    except ValueError:
        return 0


def run(folder: Path, setting: str) -> None:
    """What a user's script does who wants it to go on where it was."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    one = trainer(folder, setting)
    one.train(resume_from_checkpoint=saved(folder) > 0)
    torch.save((copies(one.model.parameters()), one.state.log_history), folder / "done.unfinished")
    (folder / "done.unfinished").rename(folder / "done.pt")


def losses(log_history: list[dict[str, float]]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in log_history if "loss" in entry}


def outcome(folder: Path) -> tuple[list[Tensor], dict[int, float]]:
    weights, history = torch.load(folder / "done.pt")
    return weights, losses(history)


@pytest.mark.parametrize(
    ("setting", "kills"), [("gains", 4), ("standardized", 3), pytest.param("gains", 20, marks=pytest.mark.slow)]
)
def test_killed_runs_end_where_others_do(tmp_path: Path, setting: str, kills: int) -> None:
    # A server that has imported everything: its processes start in no time, and threads of this one do not matter.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(folder: Path) -> Any:
        folder.mkdir(exist_ok=True)
        process = context.Process(target=run, args=(folder, setting))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    killed, moments = tmp_path / "killed", random.Random(0)
    reached = [0]
    for _ in range(kills):
        process = start(killed)
        # Some progress, then any moment of the steps and the save that follow.
        while process.exitcode is None and saved(killed) <= reached[-1]:
            time.sleep(0.005)
        time.sleep(moments.uniform(0.0, 0.1))
        if process.exitcode == 0:
            break  # there is nothing left to kill
        assert process.exitcode is None, "the run failed to resume"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(saved(killed))
    assert reached[1:]
    # Never back to an earlier one, though most of these kills leave one that is not complete.
    assert reached == sorted(set(reached))
    last = start(killed)
    for process in (last, whole):
        process.join()
        assert process.exitcode == 0
    exactly_equal(outcome(killed), outcome(tmp_path / "whole"))


def test_what_was_saved_last_is_passed_over_if_it_is_not_complete(tmp_path: Path) -> None:
    one = trainer(tmp_path, "gains")
    one.args.max_steps = 6
    one.train()
    complete = last_complete_checkpoint(tmp_path)
    assert complete.name == "checkpoint-6"
    (complete / "trainer_state.json").unlink()
    optimizer = tmp_path / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(ValueError, match=r"checkpoint-4.*: optimizer\.pt is damaged"):
        trainer(tmp_path, "gains").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="No checkpoint to resume from"):
        trainer(tmp_path, "gains").train(resume_from_checkpoint=True)
