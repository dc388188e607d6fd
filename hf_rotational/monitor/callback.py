"""A callback that measures how far neurons turn in an optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_rotational.monitor.advice import Adviser, holds_norms
from hf_rotational.monitor.header import measured_group, run_header
from hf_rotational.monitor.measure import NeuronStep, neuron_step
from hf_rotational.monitor.records import FILE_NAME, append_record, read_records, write_records
from hf_rotational.neurons import plan
from hf_rotational.optim.gains import rotating_part
from hf_rotational.optim.groups import neuron_span
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.precision import COMPENSATION, compute_dtype
from hf_rotational.optim.rotation import reduced_dims

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(f"transformers.{__name__}")


@dataclass(frozen=True)
class Measured:
    """A parameter that is measured."""

    name: str
    parameter: Tensor
    dims: tuple[int, ...]
    """The dims one neuron spans."""


class RotationMonitor(TrainerCallback):
    """Measures optimizer steps: how far the planned neurons turn, how large their updates and norms are.

    Works with any Trainer and any optimizer. Each measured step becomes a record in :attr:`records` and a line of
    ``rotation.jsonl`` in the output directory (:mod:`hf_rotational.monitor.records`); means since the last log are
    added to what the Trainer logs with the loss: ``rotation``, ``rotation_balance`` and, with a rotational optimizer,
    ``rotation_target`` (radians per step). Warns once, with advice, of angles off target, layers that do not turn,
    norms that drift and a target of 0.

    Example::

        Trainer(..., callbacks=[RotationMonitor(every=50)])   # rotation.jsonl, console, trainer_state.json
        RotationMonitor(every=50).attach(trainer)             # TensorBoard, W&B, trackio too

    ``RotationalTrainer`` attaches one itself, by ``rotation_logging_steps``.

    Args:
        every: measure every this many optimizer steps, beginning with the first. Copies of the rotating weights are
            held during measured steps only.

    Raises:
        ValueError: if ``every`` is below 1.
    """

    def __init__(self, every: int = 25) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every} (must be at least 1)")
        self.every = every
        self.records: list[dict[str, Any]] = []
        self._measured: tuple[Measured, ...] = ()
        self._before: list[Tensor] = []
        self._adviser: Adviser | None = None
        self._logged = 0

    def attach(self, trainer: Trainer) -> RotationMonitor:
        """Adds this monitor to a trainer, ahead of what reports to TensorBoard and the like, so that those see it."""
        callbacks = trainer.callback_handler.callbacks
        if self not in callbacks:
            trainer.add_callback(self)
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Plans the model and starts the file, keeping the records of a run that is resumed."""
        model: nn.Module = kwargs["model"]
        optimizer = unwrapped(kwargs.get("optimizer"))
        self._measured = measured(model, optimizer)
        say = logger.warning if state.is_world_process_zero else lambda _: None
        if not self._measured:
            say(f"RotationMonitor: no parameter of {type(model).__name__} rotates, so there is nothing to measure")
        group = measured_group(optimizer, self._measured) if optimizer else {}
        low_precision = any(entry.parameter.dtype.itemsize < 4 for entry in self._measured)
        self._adviser = Adviser(say, low_precision, holds_norms=holds_norms(group))
        path = self._path(args)
        self.records = self._records_until(state.global_step, path)
        self._logged = len(self.records)
        if state.is_world_process_zero:
            dataset = getattr(kwargs.get("train_dataloader"), "dataset", None)
            header = run_header(args, state, model, optimizer, self._measured, self.every, dataset)
            write_records(path, [header, *self.records])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the weights if this step is measured and DeepSpeed takes it: it does within the backward pass."""
        if isinstance(kwargs.get("optimizer"), DeepSpeedOptimizerWrapper):
            self._copy(state, kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copies the weights if this step is measured."""
        if not isinstance(kwargs["optimizer"], DeepSpeedOptimizerWrapper):
            self._copy(state, kwargs["optimizer"])

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures against the copies and drops them."""
        before, self._before = self._before, []
        if not before or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return  # not measured, or the gradient scaler found an infinity
        steps = {
            entry.name: neuron_step(copy, weight(entry.parameter, kwargs["optimizer"]), entry.dims)
            for copy, entry in zip(before, self._measured, strict=True)
        }
        record = self._record(state.global_step + 1, steps, unwrapped(kwargs["optimizer"]))
        self.records.append(record)
        assert self._adviser is not None
        self._adviser.look(record)
        if state.is_world_process_zero:
            append_record(self._path(args), record)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the means of what was measured since the last log to logs of the loss."""
        recent = self.records[self._logged :]
        if logs is None or "loss" not in logs or not recent:
            return
        self._logged = len(self.records)
        for key, name in (("rotation", "rotation"), ("target", "rotation_target"), ("balance", "rotation_balance")):
            values = [record[key] for record in recent if record[key] is not None]
            if values:
                logs[name] = sum(values) / len(values)
                # The Trainer has put a copy of the logs here, for trainer_state.json.
                state.log_history[-1][name] = logs[name]

    def _copy(self, state: TrainerState, optimizer: Any) -> None:
        # global_step still counts the steps before this one.
        if state.global_step % self.every == 0:
            self._before = [weight(entry.parameter, optimizer).clone() for entry in self._measured]

    def _record(self, step: int, steps: dict[str, NeuronStep], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        targets: dict[Tensor, float] = {}
        if isinstance(optimizer, RotationalOptimizer):
            targets = {parameter: optimizer.target_rotation(group) for parameter, group in optimizer.rotating()}
        layers: dict[str, dict[str, Any]] = {}
        weighted = []
        for entry in self._measured:
            aim = targets.get(entry.parameter)
            layers[entry.name] = {**_means_and_deviations(steps[entry.name]), "target": aim}
            if aim is not None:
                weighted.append((aim, len(steps[entry.name].angle)))
        neurons = sum(count for _, count in weighted)
        return {
            "step": step,
            "learning_rate": float(measured_group(optimizer, self._measured)["lr"]),
            **_over_all([step.angle for step in steps.values()]),
            "target": sum(aim * count for aim, count in weighted) / neurons if neurons else None,
            "layers": layers,
        }

    def _records_until(self, step: int, path: Path) -> list[dict[str, Any]]:
        if not step or not path.is_file():
            return []
        try:
            return [record for record in read_records(path.parent).steps if record["step"] <= step]
        except ValueError as error:
            logger.warning(f"{error}; the records of the steps before this run are not kept")
            return []

    def _path(self, args: TrainingArguments) -> Path:
        return Path(args.output_dir or ".", FILE_NAME)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's, if it is one."""
    return getattr(optimizer, "optimizer", optimizer)


def weight(parameter: Tensor, optimizer: Any) -> Tensor:
    """The weight as the optimizer turns it: without a learned mean, and on its direction's side of a learned gain.

    With ``rounding="kahan"``, what is stored plus what rounding cut off. Stored alone, 16-bit weights wait for many
    steps and then jump: single angles are several times too large.
    """
    state = unwrapped(optimizer).state.get(parameter, {})
    stored, remainder = parameter.detach(), state.get(COMPENSATION)
    whole = stored if remainder is None else stored.to(compute_dtype(stored)) + remainder
    return rotating_part(whole, state)


def measured(model: nn.Module, optimizer: Any) -> tuple[Measured, ...]:
    """What rotates or, if the optimizer does not rotate anything, what would. Frozen parameters are left out."""
    if isinstance(optimizer, RotationalOptimizer):
        spans = {parameter: neuron_span(parameter, group) for parameter, group in optimizer.rotating()}
    else:
        spans = {
            entry.parameter: reduced_dims(entry.parameter.ndim, entry.neuron_dims)
            for entry in plan(model).rotating
            if entry.parameter.requires_grad
        }
    return tuple(
        Measured(name, parameter, spans[parameter])
        for name, parameter in model.named_parameters()
        if parameter in spans
    )


def _over_all(layers: list[Tensor]) -> dict[str, float | None]:
    """``rotation`` and ``balance`` of a step; ``None`` where no neuron has a direction, or too many are still."""
    angles = torch.cat([layer.to(layers[0].device) for layer in layers])  # a model may be spread over devices
    if not len(angles):
        return {"rotation": None, "balance": None}
    low, high = torch.quantile(_sample(angles), angles.new_tensor([0.1, 0.9])).tolist()
    return {"rotation": float(angles.mean()), "balance": high / low if low else None}


def _means_and_deviations(step: NeuronStep) -> dict[str, list[float] | None]:
    if not len(step.angle):
        return dict.fromkeys(vars(step))
    values = torch.stack(tuple(vars(step).values()))
    # One transfer from the device for all of them.
    both = torch.stack((values.mean(1), values.std(1, correction=0)), dim=1).tolist()
    return {name: pair if all(map(math.isfinite, pair)) else None for name, pair in zip(vars(step), both, strict=True)}


def _sample(values: Tensor, most: int = 1 << 20) -> Tensor:
    """At most so many of the values, evenly spaced: torch.quantile takes no more than 2^24."""
    return values[:: -(-len(values) // most)]
