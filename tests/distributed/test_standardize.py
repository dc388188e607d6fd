"""Standardized models on two ranks, by DDP and by FSDP2, train and save what they do in one process.

Run as a script, this file is what each of the ranks does.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from hf_rotational import fold, standardize
from hf_rotational.standardize import MODES, load_raw_state_dict, raw_state_dict, raw_state_dicts
from tests.distributed.ranks import launch, leave
from tests.standardized import batch, make

CASES = [("gpt2", "function_preserving"), ("gpt_oss", "function_preserving"), *(("bert", mode) for mode in MODES[1:])]
"""Columns, experts stored the other way round (three of them, on two ranks), rows."""

State = dict[str, Tensor]
FORMS: dict[str, dict[str, bool]] = {
    "sharded": {},
    "full": {"full_state_dict": True},
    "from rank 0": {"full_state_dict": True, "broadcast_from_rank0": True},
}
"""How ``torch.distributed.checkpoint`` hands out state dicts."""


def build(name: str, mode: str) -> nn.Module:
    model = make(name, torch.float64)  # so that what is left is the order of sums
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # the default has no float64
    return standardize(model, mode)


def steps(model: nn.Module, rows: slice, count: int = 3) -> list[float]:
    """Losses of SGD steps on some rows of the batch, averaged over ranks."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tokens = batch(getattr(model, "module", model))["input_ids"][rows]
    losses = []
    for _ in range(count):
        # Not the model's own loss, which is in float32.
        loss = F.cross_entropy(model(input_ids=tokens).logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    if dist.is_initialized():
        for loss in losses:
            dist.all_reduce(loss)
        return [loss.item() / dist.get_world_size() for loss in losses]
    return [loss.item() for loss in losses]


def whole(state: State) -> State:
    """The tensors, gathered, as they are now."""
    return {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for key, t in state.items()}


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if type(module).__name__ in ("GPT2Block", "GptOssDecoderLayer", "BertLayer"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded(name: str, mode: str) -> dict[str, Any]:
    model = build(name, mode)
    shard(model)
    mine = slice(dist.get_rank(), dist.get_rank() + 1)
    result: dict[str, Any] = {"losses": steps(model, mine)}
    with pytest.raises(ValueError, match="Cannot fold a model that FSDPModule has taken over"):
        fold(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    result |= {"state": whole(state), "raw": whole(raw_state_dict(model))}
    result["full"] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))

    with torch.no_grad():  # leaves the outer parameters unsharded
        model(**batch(model))
    result["raw, unsharded"] = whole(raw_state_dict(model))
    for parameter in model.parameters():
        parameter.detach().mul_(1.5)
    load_raw_state_dict(model, result["raw"])
    result["raw, loaded whole"] = whole(raw_state_dict(model))
    model.load_state_dict(state)
    result["state, loaded"] = whole(model.state_dict())
    load_raw_state_dict(model, result["raw"])
    for form, flags in FORMS.items():
        options = StateDictOptions(**flags)
        with raw_state_dicts():
            saved = {key: value.clone() for key, value in get_model_state_dict(model, options=options).items()}
            for parameter in model.parameters():
                parameter.detach().mul_(1.5)
            set_model_state_dict(model, saved, options=options)
        result[f"raw, {form}"] = whole(raw_state_dict(model))
    result["losses after"] = steps(model, mine)
    return result


def refuse_shards() -> None:
    """Of weights that are sharded without FSDP, as tensor parallelism does it."""
    mesh = init_device_mesh("cpu", (2,))
    linear = nn.Linear(5, 4)
    standardized = standardize(nn.Linear(5, 4))
    for module, name in ((linear, "weight"), (standardized.parametrizations.weight, "original")):
        setattr(module, name, nn.Parameter(distribute_tensor(getattr(module, name).detach(), mesh, [Shard(0)])))
    with pytest.raises(ValueError, match="Cannot standardize weight: it is sharded"):
        standardize(linear)
    with pytest.raises(ValueError, match="Cannot fold weight: it is sharded"):
        fold(standardized)


def in_ddp(name: str, mode: str) -> dict[str, Any]:
    model = DistributedDataParallel(build(name, mode))
    losses = steps(model, slice(dist.get_rank(), dist.get_rank() + 1))
    return {"losses": losses, "raw": whole(raw_state_dict(model.module))}


def alone(name: str, mode: str) -> dict[str, Any]:
    model = build(name, mode)
    result: dict[str, Any] = {"losses": steps(model, slice(None))}
    result |= {"raw": whole(raw_state_dict(model)), "state": whole(model.state_dict())}
    return {**result, "losses after": steps(model, slice(None))}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(__file__, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # float64, after three steps


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_fsdp_trains_and_saves_what_one_process_does(ranks: list[Any], name: str, mode: str) -> None:
    expected = alone(name, mode)
    for rank, found in enumerate(results[f"fsdp {name} {mode}"] for results in ranks):
        for key in ("losses", "losses after", "raw", "state"):
            close(found[key], expected[key])
        assert list(found["state"]) == list(expected["state"])
        close(found["full"], expected["state"])
        close(found["state, loaded"], expected["state"])
        for key in ("raw, unsharded", "raw, loaded whole", *(f"raw, {form}" for form in FORMS)):
            assert all(torch.equal(tensor, found["raw"][part]) for part, tensor in found[key].items()), (rank, key)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_ddp_trains_what_one_process_does(ranks: list[Any], name: str, mode: str) -> None:
    expected = alone(name, mode)
    for found in (results[f"ddp {name} {mode}"] for results in ranks):
        close(found["losses"], expected["losses"])
        close(found["raw"], expected["raw"])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    refuse_shards()
    results = {
        f"{kind} {name} {mode}": run(name, mode)
        for kind, run in (("fsdp", sharded), ("ddp", in_ddp))
        for name, mode in CASES
    }
    torch.save(results, Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    leave()
