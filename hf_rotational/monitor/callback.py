"""A callback that measures how far neurons turn in each optimizer step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_rotational.monitor.measure import neuron_angles
from hf_rotational.neurons import RotationPlan, plan
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.rotation import reduced_dims


class RotationMonitor(TrainerCallback):
    """Records the mean angle by which the planned neurons turn per optimizer step, with any Trainer and any optimizer.

    Every record ``{"step", "rotation", "target"}`` goes to :attr:`records` and, as a line, to ``rotation.jsonl`` in the
    output directory: ``rotation`` is the mean over all neurons, ``target`` the mean of what a rotational optimizer
    aims at (``None`` for another one), both in radians per step.

    Args:
        every: measure every this many optimizer steps. Weights are copied in measured steps only.

    Raises:
        ValueError: if ``every`` is below 1.
    """

    FILE_NAME = "rotation.jsonl"

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every} (must be at least 1)")
        self.every = every
        self.records: list[dict[str, Any]] = []
        self._plan: RotationPlan | None = None
        self._before: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plans the model and starts the file, keeping the records of a run that is resumed."""
        model: nn.Module = kwargs["model"]
        self._plan = plan(model)
        self.records = []
        path = Path(args.output_dir or ".", self.FILE_NAME)
        if state.global_step and path.exists():
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self.records = [record for record in lines if record["step"] <= state.global_step]
        if state.is_world_process_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{json.dumps(record)}\n" for record in self.records), encoding="utf-8")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the weights if this step is measured. ``global_step`` still counts the steps before this one."""
        if self._plan and state.global_step % self.every == 0:
            self._before = [entry.parameter.detach().clone() for entry in self._plan.rotating]

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures against the copies and drops them."""
        if not self._before or self._plan is None:
            return
        angles = [
            neuron_angles(before, entry.parameter, reduced_dims(before.ndim, entry.neuron_dims))
            for before, entry in zip(self._before, self._plan.rotating, strict=True)
        ]
        self._before = []
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        record = {
            "step": state.global_step + 1,
            "rotation": float(torch.cat(angles).mean()),
            "target": _mean_target(optimizer) if isinstance(optimizer, RotationalOptimizer) else None,
        }
        self.records.append(record)
        if state.is_world_process_zero:
            with Path(args.output_dir or ".", self.FILE_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _mean_target(optimizer: RotationalOptimizer) -> float:
    """Target angle, averaged over the rotating neurons."""
    targets, neurons = [], []
    for parameter, group in optimizer.rotating():
        targets.append(optimizer.target_rotation(group))
        neurons.append(math.prod(parameter.shape[dim] for dim in group["neuron_dims"]))
    weighted = (target * count for target, count in zip(targets, neurons, strict=True))
    return float(sum(weighted) / sum(neurons))
