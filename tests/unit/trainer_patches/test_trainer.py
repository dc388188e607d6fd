"""The Trainer while it is patched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import trainer_patches
from hf_rotational import RotationalTrainer, RotationalTrainerMixin, RotationalTrainingArguments, RotationMonitor
from hf_rotational.training import behavior


@pytest.fixture
def patched() -> Any:
    with trainer_patches.patched():
        yield


def monitors(trainer: Trainer) -> list[int]:
    return [cb.every for cb in trainer.callback_handler.callbacks if isinstance(cb, RotationMonitor)]


def test_the_mixin_has_every_method_of_its_own() -> None:
    assert behavior.METHODS.keys() <= vars(RotationalTrainerMixin).keys()


@pytest.mark.parametrize(
    ("given", "every"),
    [
        ({}, []),
        ({"weight_standardization": "gain"}, []),
        ({"rotation_logging_steps": 3}, [3]),
        ({"optim": "rotational_adamw"}, [25]),
        ({"optim": "rotational_adamw", "rotation_logging_steps": 0}, []),
    ],
)
def test_monitors_are_attached_by_the_arguments(
    patched: None, tmp_path: Path, given: dict[str, Any], every: list[int]
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **given)
    assert monitors(Trainer(model=torch.nn.Linear(4, 4), args=args)) == every


def test_a_rotational_trainer_does_nothing_twice(
    patched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(behavior, "save_raw_weights", lambda *args: calls.append(args))
    args = RotationalTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    trainer = RotationalTrainer(model=torch.nn.Linear(4, 4), args=args)
    assert monitors(trainer) == [25]
    trainer.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert len(calls) == 1


def test_runs_that_do_not_ask_go_straight_to_the_trainers_methods(
    patched: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in ("standardize_model", "save_raw_weights", "load_weights", "check_resumable"):
        monkeypatch.setattr(behavior, name, refuse)
    rows = [{"x": torch.randn(4), "labels": torch.randn(4)} for _ in range(8)]

    class Regression(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.linear(x) - labels).square().mean()}

    def run(**given: Any) -> Trainer:
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, disable_tqdm=True, **given
        )
        return Trainer(model=Regression(), args=args, train_dataset=rows)

    run().train()
    run().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(AssertionError):
        run(optim="rotational_adamw").train()
