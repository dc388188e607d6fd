"""What RotationMonitor costs: its share of the time of training the demo's model on the demo's batches.

    python -m benchmarks.monitor_cost

Trains all-MiniLM-L6-v2 (the ``demo`` extra installs it) on 16 texts of 32 tokens a step, with AdamW and with rotational
AdamW, at the monitor's default interval and at every step. The clock runs inside the callback, so that monitor and
training are timed in one and the same run. Prints a table and writes ``benchmarks/results/monitor_cost.json``.
Exits with status 1 if the default interval costs 2 % or more.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from hf_rotational import RotationalTrainer, RotationalTrainingArguments, RotationMonitor
from hf_rotational.demo.arguments import DemoArguments
from hf_rotational.demo.model import load_classifier, load_tokenizer, packaged_model, quiet

RESULTS = Path(__file__).parent / "results" / "monitor_cost.json"
DEFAULT = RotationalTrainingArguments.rotation_logging_steps
STEPS = {DEFAULT: 2 * DEFAULT, 1: 12}  # multiples of the interval: as many are measured as in a long run
LIMIT = 0.02
DEMO = DemoArguments()
LABELS = [f"label {place}" for place in range(14)]


class TimedMonitor(RotationMonitor):
    """Adds up the time spent in the monitor during training."""

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.seconds = 0.0

    def timed(self, event: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        event(*args, **kwargs)
        self.seconds += time.perf_counter() - start

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.timed(super().on_train_begin, *args, **kwargs)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timed(super().on_pre_optimizer_step, *args, **kwargs)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timed(super().on_optimizer_step, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.timed(super().on_log, *args, **kwargs)


@dataclass(frozen=True)
class Cost:
    optimizer: str
    every: int
    steps: int
    ms_per_step: float
    """Of training, the monitor's part included."""
    ms_per_measured_step: float
    """Of the monitor alone."""
    share: float
    """Of the monitor in the time of training."""


def measure(optim: str, every: int, folder: str) -> Cost:
    """One short training run."""
    source, steps = packaged_model(), STEPS[every]
    tokenizer = load_tokenizer(source)
    batch = DEMO.per_device_train_batch_size
    rows = torch.randint(1000, len(tokenizer), (batch, DEMO.max_length), generator=torch.Generator().manual_seed(0))
    monitor = TimedMonitor(every)
    with quiet():
        trainer = RotationalTrainer(
            model=load_classifier(source, tokenizer, LABELS, seed=0),
            args=RotationalTrainingArguments(
                output_dir=folder,
                optim=optim,
                learning_rate=DEMO.learning_rate,
                max_steps=steps,
                per_device_train_batch_size=batch,
                logging_steps=1,  # as the demo does
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"input_ids": rows.tolist(), "labels": [0, 1] * (batch // 2)}),
            callbacks=[monitor],
        )
        trainer.pop_callback(type(trainer.callback_handler.callbacks[-1]))  # prints every log
        seconds = trainer.train().metrics["train_runtime"]
    return Cost(
        optimizer=optim,
        every=every,
        steps=steps,
        ms_per_step=1e3 * seconds / steps,
        ms_per_measured_step=1e3 * monitor.seconds / len(monitor.records),
        share=monitor.seconds / seconds,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure("adamw_torch", 1, folder)  # the first run of a process is slower
        costs = [measure(optim, every, folder) for optim in ("adamw_torch", "rotational_adamw") for every in STEPS]
    batch = f"{DEMO.per_device_train_batch_size} x {DEMO.max_length} tokens"
    table = Table(title=f"RotationMonitor on all-MiniLM-L6-v2, {batch} a step, {torch.get_num_threads()} thread(s)")
    for column in ("optimizer", "measured", "ms per step", "ms per measured step", "share of training time"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for cost in costs:
        table.add_row(
            cost.optimizer,
            f"every {cost.every}",
            f"{cost.ms_per_step:.0f}",
            f"{cost.ms_per_measured_step:.0f}",
            f"{cost.share:.2%}",
        )
    Console(width=120).print(table)
    result = {"torch": torch.__version__, "threads": torch.get_num_threads(), "costs": [asdict(cost) for cost in costs]}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(cost.share >= LIMIT for cost in costs if cost.every == DEFAULT))


if __name__ == "__main__":
    main()
