"""RotationMonitor on two ranks: the records are those of one process, and sharded weights are measured whole.

Run as a script, this file is what each of the processes does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.ranks import launch, leave

STEPS = 4
SHAPE = (5, 7)  # divides by 2 in neither dim


def train(folder: str, batch_size: int) -> None:
    """Trains on the ranks there are; the first writes the records into the folder."""
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification, set_seed

    from hf_rotational import RotationalTrainer, RotationalTrainingArguments

    set_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=40,
        hidden_dropout_prob=0.0,  # ranks would draw their own
        attention_probs_dropout_prob=0.0,
    )
    rows = [[(7 * row + column) % 40 for column in range(6)] for row in range(64)]
    RotationalTrainer(
        model=BertForSequenceClassification(config).double(),  # Adam makes much of rounding where gradients are tiny
        args=RotationalTrainingArguments(
            output_dir=folder,
            learning_rate=1e-2,
            per_device_train_batch_size=batch_size,
            max_steps=STEPS,
            average_tokens_across_devices=False,  # else the Trainer adds up the means that ranks have of their losses
            rotation_logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": [row[0] % 2 for row in rows]}),
    ).train()


def two_weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(SHAPE, generator=generator)
    before[2] = 0.0  # a neuron without direction, on one of the ranks
    return before, before + 1e-3 * torch.randn(SHAPE, generator=generator)


def measure_shards(folder: str) -> None:
    """Measures the two weights, sharded along either dim, with neurons along either dim."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from hf_rotational.monitor.measure import neuron_step

    mesh = init_device_mesh("cpu", (2,))
    measured = {}
    for placement in (Shard(0), Shard(1), Replicate()):
        before, after = (distribute_tensor(weight, mesh, [placement]) for weight in two_weights())
        for dim in (0, 1):
            step = neuron_step(before, after, (dim,))
            measured[f"{placement} {dim}"] = {name: values.tolist() for name, values in vars(step).items()}
    rank = torch.distributed.get_rank()
    Path(folder, f"shards-{rank}.json").write_text(json.dumps(measured))


def measure_fully_sharded(folder: str) -> None:
    """A monitored step of a model under FSDP2, driven by hand."""
    from types import SimpleNamespace

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    monitor = monitored_step(model, SimpleNamespace(rank=torch.distributed.get_rank(), folder=folder))
    rank = torch.distributed.get_rank()
    Path(folder, f"fsdp-{rank}.json").write_text(json.dumps(monitor))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def monitored_step(model: nn.Module, where: Any) -> list[dict[str, Any]]:
    """Records of two steps on one and the same batch."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_rotational import RotationalAdamW, RotationMonitor, plan

    monitor = RotationMonitor(every=1)
    optimizer = RotationalAdamW(plan(model).parameter_groups(), lr=1e-2, weight_decay=0.1)
    arguments = TrainingArguments(output_dir=f"{where.folder}/{where.rank}", use_cpu=True, report_to="none")
    state, control = TrainerState(max_steps=2), TrainerControl()
    monitor.on_train_begin(arguments, state, control, model=model, optimizer=optimizer)
    batch = torch.arange(18.0).reshape(3, 6).sin()
    for step in range(2):
        state.global_step = step
        model(batch).square().mean().backward()
        monitor.on_pre_optimizer_step(arguments, state, control, model=model, optimizer=optimizer)
        optimizer.step()
        monitor.on_optimizer_step(arguments, state, control, model=model, optimizer=optimizer)
        optimizer.zero_grad()
    return monitor.records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have left what they measured."""
    path = tmp_path_factory.mktemp("ranks")
    launch(__file__, 2, str(path))
    return path


def close(measured: Any, expected: Any) -> None:
    """Compares nested records; sums over ranks are rounded in another order."""
    if isinstance(expected, dict):
        assert measured.keys() == expected.keys()
        for key, value in expected.items():
            close(measured[key], value)
    elif isinstance(expected, list) and any(isinstance(value, dict) for value in expected):
        for one, other in zip(measured, expected, strict=True):
            close(one, other)
    else:
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_records_of_two_ranks_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    from hf_rotational.monitor.records import read_records

    train(str(tmp_path), batch_size=8)
    alone, together = read_records(tmp_path), read_records(folder / "ddp")
    assert together.header == alone.header
    assert len(together.steps) == STEPS  # one file, written by one rank
    close(together.steps, alone.steps)


def test_shards_are_measured_whole_on_every_rank(folder: Path) -> None:
    from hf_rotational.monitor.measure import neuron_step

    for rank in (0, 1):
        measured = json.loads((folder / f"shards-{rank}.json").read_text())
        assert len(measured) == 6
        for case, statistics in measured.items():
            expected = neuron_step(*two_weights(), (int(case[-1]),))
            close(statistics, {name: values.tolist() for name, values in vars(expected).items()})


def test_records_under_fsdp_are_those_of_one_process(folder: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    alone = monitored_step(small_model(), SimpleNamespace(rank=0, folder=str(tmp_path)))
    for rank in (0, 1):
        close(json.loads((folder / f"fsdp-{rank}.json").read_text()), alone)


if __name__ == "__main__":
    output = sys.argv[1]
    train(f"{output}/ddp", batch_size=4)
    measure_shards(output)
    measure_fully_sharded(output)
    leave()
