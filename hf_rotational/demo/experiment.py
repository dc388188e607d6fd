"""The demo's experiment: the same fine-tuning twice, by AdamW with warmup and by rotational AdamW without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import DatasetDict
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_rotational import RotationalTrainer, RotationalTrainingArguments, RotationMonitor
from hf_rotational.demo.arguments import DemoArguments
from hf_rotational.monitor.plots import Run

ACCURACY = Path(__file__).parent / "metrics" / "accuracy.py"
EVAL_BATCH_SIZE = 32  # the result does not depend on it


@dataclass(frozen=True)
class Arm:
    """One of the two ways to train that are compared; all else is equal."""

    name: str
    folder: str
    """Where its files go, inside the output directory."""
    optim: str
    warmup_steps: float
    """Below 1: as a share of all steps."""


ADAMW = Arm("AdamW, 10 % warmup", "adamw", "adamw_torch", 0.1)
ROTATIONAL = Arm("Rotational AdamW, no warmup", ".", "rotational_adamw", 0)


@dataclass(frozen=True)
class Outcome:
    """What came of one arm."""

    run: Run
    loss: float
    """On the validation split, as is the accuracy."""
    accuracy: float
    """Between 0 and 1."""
    steps: int
    seconds: float
    """Of training, without loading and evaluation."""


class LossBar(ProgressCallback):
    """The Trainer's progress bar, with the loss on it instead of a line of text for every step."""

    training_bar: Any  # tqdm's, or None
    prediction_bar: Any

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens the bar, under the arm's name."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Shows the loss of the last step."""
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.2f}")

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Moves the bar of the evaluation, which also gets a name."""
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)  # type: ignore[no-untyped-call]
        if self.prediction_bar is not None and not self.prediction_bar.desc:
            self.prediction_bar.set_description(f"{self.name}: validation")


def train_arm(
    arm: Arm,
    arguments: DemoArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
) -> tuple[RotationalTrainer, Outcome]:
    """Fine-tunes ``model`` on the tokenized ``data`` the way ``arm`` says, and evaluates it.

    Everything random hangs on ``arguments.seed``, so both arms see the same batches. Returns the trainer with the
    trained model, and the outcome.
    """
    monitor = RotationMonitor(every=1)
    trainer = RotationalTrainer(
        model=model,
        args=RotationalTrainingArguments(
            output_dir=str(Path(arguments.output_dir, arm.folder)),
            optim=arm.optim,
            warmup_steps=arm.warmup_steps,
            learning_rate=arguments.learning_rate,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            per_device_eval_batch_size=EVAL_BATCH_SIZE,
            seed=arguments.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,  # a run that diverges shall show it
            save_strategy="no",
            report_to="none",
            disable_tqdm=False,
            dataloader_pin_memory=torch.cuda.is_available(),  # elsewhere it does nothing but warn
        ),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy_of(),
        callbacks=[monitor],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar(arm.name))
    training = trainer.train()
    evaluation = trainer.evaluate()
    trainer.save_state()
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    return trainer, Outcome(
        run=Run(arm.name, losses, monitor.records),
        loss=evaluation["eval_loss"],
        accuracy=evaluation["eval_accuracy"],
        steps=trainer.state.global_step,
        seconds=training.metrics["train_runtime"],
    )


def accuracy_of() -> Callable[[EvalPrediction], dict[str, float]]:
    """What the Trainer calls with logits and labels: their accuracy, by the ``evaluate`` library."""
    metric = evaluate.load(str(ACCURACY), keep_in_memory=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits, labels = prediction.predictions, prediction.label_ids
        if isinstance(logits, tuple):  # some models also return hidden states
            logits = logits[0]
        result: dict[str, float] = metric.compute(predictions=np.argmax(logits, axis=-1), references=labels)
        return result

    return compute
