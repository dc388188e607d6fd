"""Weights sharded along any dims, over one or two mesh dims (tensor and expert parallel, HSDP, FSDP2 over tensor
parallel), take the steps that they take whole.

Run as a script, this file is what each of four ranks does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_rotational import RotationalAdamW, RotationalLion, rotational
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.distributed.ranks import launch, leave
from tests.helpers import LR, WEIGHT_DECAY, gradient, noise
from tests.helpers import train as train_on_noise

STEPS = 4
SHAPES = [(5, 7), (7, 5), (3, 4, 6), (5, 7), (6,)]  # even and uneven parts, and ranks with none; vectors are replicated
LAYOUTS: dict[str, tuple[tuple[int, ...], Sequence[Placement]]] = {
    "columns": ((4,), [Shard(1)]),
    "replicas of rows": ((2, 2), [Replicate(), Shard(0)]),
    "replicas of columns": ((2, 2), [Shard(1), Replicate()]),
    "blocks": ((2, 2), [Shard(0), Shard(1)]),
    "rows of rows": ((2, 2), [Shard(0), Shard(0)]),
}
OPTIONS: dict[str, Any] = {
    "AdamW": RotationalAdamW,
    "AdamW, centred updates": partial(RotationalAdamW, centering="updates"),
    "AdamW, gains": partial(RotationalAdamW, gains="learned", backend="foreach"),
    "AdamW, gains and means": partial(RotationalAdamW, gains="learned", centering="learned"),
    "AdamW, tensors": partial(RotationalAdamW, granularity="tensor", backend="foreach"),
    "AdamW, match": partial(RotationalAdamW, rotation="match"),
    "Lion, forgetful": partial(RotationalLion, update_norm_decay=0.5, centering="weights"),
    "NAdam": rotational(torch.optim.NAdam),
}


def build(name: str, parameters: Sequence[Tensor]) -> RotationalOptimizer:
    """Neurons are rows, except those of the second matrix (columns) and of the stack (a row of a matrix)."""
    groups = [
        {"params": [parameters[0], parameters[3], parameters[4]]},
        {"params": [parameters[1]], "neuron_dims": (1,)},
        {"params": [parameters[2]], "neuron_dims": (0, 1)},
    ]
    optimizer: RotationalOptimizer = OPTIONS[name](groups, lr=LR, weight_decay=WEIGHT_DECAY)
    return optimizer


def expected(name: str) -> list[Tensor]:
    """What unsharded weights become."""
    weights = [nn.Parameter(noise(*shape, seed=place)) for place, shape in enumerate(SHAPES)]
    train_on_noise(build(name, weights), weights, range(STEPS))
    return [weight.detach() for weight in weights]


def placed(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor sharded so, or replicated if it is a vector."""
    return distribute_tensor(tensor, mesh, placements if tensor.ndim > 1 else [Replicate()] * mesh.ndim)


def step_on_meshes(folder: Path) -> None:
    for layout, (shape, placements) in LAYOUTS.items():
        mesh = init_device_mesh("cpu", shape)
        for name in OPTIONS:
            weights = [
                nn.Parameter(placed(noise(*shape, seed=place), mesh, placements)) for place, shape in enumerate(SHAPES)
            ]
            optimizer = build(name, weights)
            for step in range(STEPS):
                for place, weight in enumerate(weights):
                    # Gradients may come in another layout than their weights, which torch's own optimizers do not take.
                    as_weight = step % 2 or name == "NAdam"
                    grad = gradient(torch.empty(weight.shape, dtype=weight.dtype), place, step)
                    weight.grad = placed(grad, mesh, placements if as_weight else [Replicate()] * mesh.ndim)
                optimizer.step()
            assert all(isinstance(weight, DTensor) for weight in weights)
            put(folder, f"{layout} {name}", [weight.full_tensor() for weight in weights])


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 5)).double()


def tensor_parallel(fully: bool) -> nn.Module:
    """The first layer's rows and the second's columns are on two ranks; FSDP2 cuts both by rows once more."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(mlp(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["data"]) if fully else model


def mlp_optimizer(model: nn.Module) -> RotationalOptimizer:
    return RotationalAdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, gains="learned", centering="updates")


def train(model: nn.Module, optimizer: RotationalOptimizer, steps: range) -> None:
    for step in steps:
        model(noise(4, 6, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]


def train_tensor_parallel(folder: Path) -> None:
    """Trains halfway, saves, goes on; a second model goes on from what was saved."""
    for fully in (False, True):
        model = tensor_parallel(fully)
        optimizer = mlp_optimizer(model)
        assert sum(isinstance(parameter, DTensor) for parameter in model.parameters()) >= 3
        train(model, optimizer, range(STEPS))
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        save(state, checkpoint_id=str(folder / f"saved {fully}"))
        train(model, optimizer, range(STEPS, 2 * STEPS))
        put(folder, f"parallel {fully}", whole(model))

        model = tensor_parallel(fully)
        optimizer = mlp_optimizer(model)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        load(state, checkpoint_id=str(folder / f"saved {fully}"))
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        train(model, optimizer, range(STEPS, 2 * STEPS))
        put(folder, f"resumed {fully}", whole(model))


def share_out(folder: Path) -> None:
    """Every rank steps on some of the tensors, and on them whole."""
    weights = [nn.Parameter(noise(*shape, seed=place)) for place, shape in enumerate(SHAPES)]
    shared = ZeroRedundancyOptimizer(
        [{"params": weights}], optimizer_class=RotationalAdamW, lr=LR, weight_decay=WEIGHT_DECAY
    )
    train_on_noise(shared, weights, range(STEPS))
    put(folder, "shared out", [weight.detach() for weight in weights])


def put(folder: Path, name: str, tensors: list[Tensor]) -> None:
    if dist.get_rank() == 0:
        torch.save(tensors, folder / f"{name}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks have left their weights."""
    path: Path = tmp_path_factory.mktemp("meshes")
    launch(__file__, 4, str(path))
    return path


# Sums over ranks are rounded in another order, which Adam divides by small gradients.
close = partial(torch.testing.assert_close, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_unsharded_run(folder: Path, layout: str, name: str) -> None:
    close(torch.load(folder / f"{layout} {name}.pt"), expected(name))


@pytest.mark.parametrize("fully", [False, True], ids=["tensor parallel", "FSDP2 over tensor parallel"])
@pytest.mark.parametrize("outcome", ["parallel", "resumed"])
def test_parallel_layers_train_as_whole_ones(folder: Path, outcome: str, fully: bool) -> None:
    alone = mlp()
    train(alone, mlp_optimizer(alone), range(2 * STEPS))
    close(torch.load(folder / f"{outcome} {fully}.pt"), whole(alone))


def test_tensors_shared_out_to_ranks_step_as_on_one(folder: Path) -> None:
    weights = [nn.Parameter(noise(*shape, seed=place)) for place, shape in enumerate(SHAPES)]
    train_on_noise(RotationalAdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY), weights, range(STEPS))
    close(torch.load(folder / "shared out.pt"), [weight.detach() for weight in weights])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    share_out(Path(sys.argv[1]))
    step_on_meshes(Path(sys.argv[1]))
    train_tensor_parallel(Path(sys.argv[1]))
    leave()
