"""RotationMonitor in a Trainer: what it measures is what happened, whatever the optimizer and the loop do."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_rotational import (
    RotationalOptimizerFactory,
    RotationalTrainer,
    RotationalTrainingArguments,
    RotationMonitor,
    plan,
)
from hf_rotational.monitor.records import FILE_NAME, read_records

SETTINGS = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
}
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
DATA = Dataset.from_dict(
    {"input_ids": [[(7 * row + column) % 40 for column in range(6)] for row in range(64)], "labels": [0, 1] * 32}
)


def model() -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=40)
    )


def build(folder: Path, *callbacks: TrainerCallback, trained: Any = None, **settings: Any) -> RotationalTrainer:
    """A trainer with these settings; the optimizer is rotational unless they name another."""
    return RotationalTrainer(
        model=trained or model(),
        args=RotationalTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=DATA,
        callbacks=list(callbacks),
    )


def train(folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **settings: Any) -> None:
    build(folder, *callbacks, **settings).train(resume_from_checkpoint=resume)


def steps(monitor: RotationMonitor) -> list[int]:
    return [record["step"] for record in monitor.records]


class Snapshots(TrainerCallback):
    """The rotating weights before every optimizer step, and after the last."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def take(self, trained: Any) -> None:
        self.weights.append({entry.name: entry.parameter.detach().double() for entry in plan(trained).rotating})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.take(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.take(kwargs["model"])


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the monitor has warned of."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers.hf_rotational.monitor.callback")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw_torch", "rotational_adamw"])
def test_records_say_what_happened_to_the_weights(tmp_path: Path, optim: str, dtype: torch.dtype) -> None:
    snapshots, monitor = Snapshots(), RotationMonitor(every=1)
    train(tmp_path, snapshots, monitor, trained=model().to(dtype), optim=optim, rotation_rounding="nearest")
    for record, (before, after) in zip(monitor.records, pairwise(snapshots.weights), strict=True):
        angles = []
        for name, start in before.items():
            end = after[name]
            # Not the formula the monitor uses, and in float64.
            u, v = (torch.nn.functional.normalize(weight) for weight in (start, end))
            angle = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
            angles.append(angle)
            expected = {
                "angle": angle,
                "relative_update": (end - start).norm(dim=1) / start.norm(dim=1),
                "norm": end.norm(dim=1),
            }
            for quantity, values in expected.items():
                statistics = [float(values.mean()), float(values.std(correction=0))]
                assert record["layers"][name][quantity] == pytest.approx(statistics, rel=1e-3, abs=1e-6), name
        joined = torch.cat(angles)
        low, high = torch.quantile(joined, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        assert record["rotation"] == pytest.approx(float(joined.mean()), rel=1e-3)
        assert record["balance"] == pytest.approx(high / low, rel=1e-2)
        assert (record["target"] is None) == (optim == "adamw_torch")
    assert len(monitor.records) == SETTINGS["max_steps"]


def test_kahans_remainder_belongs_to_the_weight_that_is_measured(tmp_path: Path, warnings: list[str]) -> None:
    angles = {}
    for dtype in (torch.float32, torch.bfloat16):
        monitor = RotationMonitor(every=1)
        train(tmp_path, monitor, trained=model().to(dtype), rotation_rounding="kahan", rotation=1e-4)
        angles[dtype] = [record["rotation"] for record in monitor.records]
    # 16 bits of remainder leave the angle of a step to a few per cent; stored weights alone would read 0 or far more.
    assert angles[torch.bfloat16] == pytest.approx(angles[torch.float32], rel=0.1)
    assert not warnings


def test_a_record_for_each_optimizer_step_not_for_each_batch(tmp_path: Path) -> None:
    monitor = RotationMonitor(every=2)
    train(tmp_path, monitor, gradient_accumulation_steps=3, max_steps=5)
    assert steps(monitor) == [1, 3, 5]
    assert monitor.records[0]["rotation"] == pytest.approx(monitor.records[0]["target"], rel=1e-4)


def test_copies_are_held_during_measured_steps_only(tmp_path: Path) -> None:
    def held() -> int:
        return sum(type(thing) is Tensor and thing.shape == (48, 32) for thing in gc.get_objects())

    class Probe(TrainerCallback):
        def __init__(self) -> None:
            self.during: list[int] = []
            self.after: list[int] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.during.append(held())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.after.append(held())

    probe = Probe()
    train(tmp_path, RotationMonitor(every=2), probe, max_steps=6)
    assert probe.during[2] == probe.during[1] + 1  # the third step is measured, the second is not
    assert probe.during[3] == probe.during[1]
    assert len(set(probe.after[1:])) == 1


def test_a_step_the_gradient_scaler_skips_is_not_measured(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                next(kwargs["model"].parameters()).grad.fill_(torch.inf)

    monitor = RotationMonitor(every=1)
    trainer = build(tmp_path, Overflow(), monitor)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # as fp16=True does on an accelerator
    trainer.train()
    assert steps(monitor) == [1, 3, 4]
    assert all(record["rotation"] > 0 for record in monitor.records)


def test_resuming_keeps_the_records_before_the_checkpoint_and_a_new_run_does_not(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "rotation_logging_steps": 1}
    train(tmp_path, **settings)
    path = tmp_path / FILE_NAME
    before = path.read_text().splitlines()
    path.write_text(path.read_text()[:-20])  # as if the run had crashed in the middle of the last line
    train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    after = path.read_text().splitlines()
    assert after[1:3] == before[1:3]
    assert [record["step"] for record in read_records(tmp_path).steps] == [1, 2, 3, 4]
    assert read_records(tmp_path).problems == []

    train(tmp_path, max_steps=1, rotation_logging_steps=1)
    assert [record["step"] for record in read_records(tmp_path).steps] == [1]


def test_resuming_over_records_that_cannot_be_read(tmp_path: Path, warnings: list[str]) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "rotation_logging_steps": 1}
    train(tmp_path, **settings)
    (tmp_path / FILE_NAME).write_text('{"version": 99}\n')
    train(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert [record["step"] for record in read_records(tmp_path).steps] == [3, 4]
    assert len([sentence for sentence in warnings if "version 99" in sentence]) == 1


@pytest.mark.parametrize(
    ("optim", "weight_decay", "in_header"), [("adamw_torch", 0.1, 0.1), ("rotational_adamw", 0.0, 0.1)]
)
def test_the_header_has_the_settings_of_what_is_measured(
    tmp_path: Path, optim: str, weight_decay: float, in_header: float
) -> None:
    train(tmp_path, optim=optim, weight_decay=weight_decay, warmup_steps=2, rotation_logging_steps=3)
    header = read_records(tmp_path).header
    assert header["optim"] == optim
    assert header["settings"]["weight_decay"] == in_header  # that of biases, or of embeddings, is 0
    assert header["settings"]["lr"] == 1e-2  # the schedule begins at 0
    assert header["settings"]["betas"] == [0.9, 0.999]
    assert (header["warmup_steps"], header["max_steps"], header["every"]) == (2, 4, 3)
    assert header["parameters"][QUERY] == {"shape": [32, 32], "neuron_dims": [0], "dtype": "float32"}


def test_what_is_measured_is_what_the_optimizer_rotates(tmp_path: Path) -> None:
    monitor = RotationMonitor(every=1)
    train(tmp_path, monitor, rotation_embeddings=True, rotation_granularity="tensor", max_steps=1)
    (record,) = monitor.records
    embedding = record["layers"]["bert.embeddings.word_embeddings.weight"]
    # Each tensor as a whole turns by the target; its neurons do not.
    assert embedding["angle"] == pytest.approx([record["target"], 0.0], rel=1e-4)
    assert record["balance"] == pytest.approx(1.0, rel=1e-3)


def test_embeddings_that_rotate_are_measured_row_by_row(tmp_path: Path) -> None:
    monitor = RotationMonitor(every=1)
    train(tmp_path, monitor, rotation_embeddings=True, max_steps=1)
    embedding = monitor.records[0]["layers"]["bert.embeddings.token_type_embeddings.weight"]
    assert read_records(tmp_path).header["parameters"]["bert.embeddings.token_type_embeddings.weight"] == {
        "shape": [2, 32],
        "neuron_dims": [0],
        "dtype": "float32",
    }
    # Of two rows one has no gradient and stays: mean and deviation are both half of the target.
    assert embedding["angle"] == pytest.approx([embedding["target"] / 2] * 2, rel=1e-4)


def test_frozen_parameters_are_left_out(tmp_path: Path) -> None:
    trained, monitor = model(), RotationMonitor(every=1)
    trained.requires_grad_(False)
    attention = trained.bert.encoder.layer[0].attention.output.dense.weight.requires_grad_()
    train(tmp_path, monitor, trained=trained, optim="adamw_torch", max_steps=1)
    (name,) = monitor.records[0]["layers"]
    assert trained.get_parameter(name) is attention


def test_a_model_in_which_nothing_rotates(tmp_path: Path, warnings: list[str]) -> None:
    trained, monitor = model(), RotationMonitor(every=1)
    trained.bert.requires_grad_(False)
    train(tmp_path, monitor, trained=trained, optim="adamw_torch", max_steps=2)
    assert monitor.records == []
    assert warnings == [
        "RotationMonitor: no parameter of BertForSequenceClassification rotates, so there is nothing to measure"
    ]


def test_a_layer_that_stands_still_is_warned_of_once(tmp_path: Path, warnings: list[str]) -> None:
    trained = model()
    trained.get_parameter(QUERY).register_hook(torch.zeros_like)
    train(tmp_path, RotationMonitor(every=1), trained=trained, optim="adamw_torch", weight_decay=0.0, max_steps=6)
    assert warnings == [f"no turning of {QUERY} at step 3: is the gradient 0? Else leave it out (rotation_exclude)"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("optim", ["adamw_torch", "rotational_adamw"])
def test_a_run_that_diverges_is_recorded_to_its_end(tmp_path: Path, optim: str, value: float) -> None:
    class Diverge(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                kwargs["model"].get_parameter(QUERY).data.fill_(value)

    monitor = RotationMonitor(every=1)
    train(tmp_path, Diverge(), monitor, optim=optim)
    last = monitor.records[-1]
    assert last["layers"][QUERY]["angle"] is None
    assert steps(monitor) == [1, 2, 3, 4]
    # NaN is no JSON, though Python's own parser takes it.
    for line in (tmp_path / FILE_NAME).read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def stock(folder: Path, **settings: Any) -> Trainer:
    trainer = Trainer(
        model=model(),
        args=TrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=DATA,
        optimizer_cls_and_kwargs=(RotationalOptimizerFactory, {"lr": 1e-2, "weight_decay": 0.1}),
    )
    RotationMonitor(every=1).attach(trainer)
    return trainer


@pytest.mark.parametrize("trainer_for", [partial(build, rotation_logging_steps=1), stock], ids=["rotational", "stock"])
def test_tensorboard_gets_the_scalars(tmp_path: Path, trainer_for: Callable[..., Trainer]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_for(tmp_path, logging_steps=2, report_to="tensorboard")
    trainer.train()
    (events,) = tmp_path.rglob("events.out.tfevents*")
    written = accumulator.EventAccumulator(str(events))
    written.Reload()
    records = read_records(tmp_path).steps
    for quantity, tag in (("rotation", "rotation"), ("target", "rotation_target"), ("balance", "rotation_balance")):
        means = [sum(record[quantity] for record in records[at : at + 2]) / 2 for at in (0, 2)]
        scalars = written.Scalars(f"train/{tag}")
        assert [scalar.step for scalar in scalars] == [2, 4]
        assert [scalar.value for scalar in scalars] == pytest.approx(means, rel=1e-5)
        assert [entry[tag] for entry in trainer.state.log_history if "loss" in entry] == means


def test_as_a_plain_callback_it_reaches_the_trainers_state(tmp_path: Path) -> None:
    monitor = RotationMonitor(every=3)
    trainer = Trainer(
        model=model(),
        args=TrainingArguments(output_dir=str(tmp_path), logging_steps=1, **SETTINGS),
        train_dataset=DATA,
        callbacks=[monitor],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [log.get("rotation") for log in logs] == [
        monitor.records[0]["rotation"],
        None,
        None,
        monitor.records[1]["rotation"],
    ]
    assert not any("rotation_target" in log for log in logs)


def test_attaching_twice_measures_once(tmp_path: Path) -> None:
    trainer = stock(tmp_path)
    (monitor,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, RotationMonitor))
    assert monitor.attach(trainer) is monitor
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, RotationMonitor)] == [monitor]


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_below_one_is_refused(every: int) -> None:
    with pytest.raises(ValueError, match=f"Invalid every: {every}"):
        RotationMonitor(every=every)
