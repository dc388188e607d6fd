"""Weights sharded over ranks by FSDP2 (DTensors) take the steps that they take whole.

Run as a script, this file is what each of the ranks does.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from hf_rotational import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD, plan, rotational
from hf_rotational.optim.kernels import build, cpu
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.distributed.ranks import launch, leave

STEPS, BEFORE_SAVING = 6, 3
BUILD: dict[str, Any] = {
    "AdamW": RotationalAdamW,
    "Adam, centred": partial(RotationalAdam, centering="weights"),
    "SGD, tensors": partial(RotationalSGD, momentum=0.9, granularity="tensor"),
    "Lion, forgetful": partial(RotationalLion, update_norm_decay=0.5, centering="updates"),
    "AdamW, match": partial(RotationalAdamW, rotation="match", backend="foreach"),
    "AdamW, gains": partial(RotationalAdamW, gains="learned"),
    # Behind a normalization the gradient of a mean starts as rounding, which AdamW and Lion would make a step of.
    "SGD, gains and means": partial(RotationalSGD, gains="learned", centering="learned", backend="foreach"),
    "AdamW, kahan": partial(RotationalAdamW, gains="learned", rounding="kahan"),
    "NAdam": rotational(torch.optim.NAdam),
}


def gpt2(layers: int = 2) -> nn.Module:
    """Neurons of its Conv1D are columns, which shards cut; embedding and head are tied."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=6, n_layer=layers, n_head=2, vocab_size=11, n_positions=8)
    model = GPT2LMHeadModel(config).double().eval()  # ranks would draw dropout apart
    for block in model.transformer.h:
        # A key's bias changes nothing, so its gradient is rounding, of which Lion takes the sign.
        block.attn.c_attn.bias.requires_grad_(False)
    return model


def mixtral() -> nn.Module:
    """Stacked experts, fewer than four ranks."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=8,
        intermediate_size=5,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        vocab_size=11,
        experts_implementation="eager",  # the others have no float64
    )
    return MixtralForCausalLM(config).double()


MODELS = {
    "gpt2": gpt2,
    "gpt2 in bfloat16": lambda: gpt2().bfloat16(),
    "mixtral": mixtral,
    "mixtral in float32": lambda: mixtral().float(),  # which the CPU kernel steps
}


def optimizer_of(model: nn.Module, name: str) -> RotationalOptimizer:
    # Embeddings rotate too, so that tied ones are among what is compared.
    optimizer: RotationalOptimizer = BUILD[name](
        plan(model, embeddings=True).parameter_groups(), lr=1e-2, weight_decay=0.1
    )
    return optimizer


def train(model: nn.Module, optimizer: RotationalOptimizer, steps: range) -> None:
    for step in steps:
        tokens = (torch.arange(16).reshape(2, 8) * (step + 3)) % 11
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded(model: nn.Module) -> nn.Module:
    for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }


@cache
def expected(model: str, name: str) -> dict[str, Tensor]:
    """The weights that one process arrives at."""
    alone = MODELS[model]()
    train(alone, optimizer_of(alone, name), range(STEPS))
    return whole(alone)


def train_and_save(folder: Path) -> None:
    """Trains every model with every optimizer; saves halfway, from the ranks there are."""
    for model_name, name in CASES:
        model = sharded(MODELS[model_name]())
        optimizer = optimizer_of(model, name)
        assert all(isinstance(parameter, DTensor) for parameter, _ in optimizer.rotating())
        with mock.patch.object(cpu, "kernel", wraps=cpu.kernel) as kernel:
            train(model, optimizer, range(BEFORE_SAVING))
        assert kernel.called == (model_name == "mixtral in float32" and build.unavailable() is None)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        save(state, checkpoint_id=str(folder / f"{model_name} {name}"))
        train(model, optimizer, range(BEFORE_SAVING, STEPS))
        put(folder, f"{model_name} {name} trained", whole(model))


def resume(folder: Path, ranks: int) -> None:
    """Loads what other ranks have saved and goes on."""
    for model_name, name in CASES:
        model = sharded(MODELS[model_name]())
        optimizer = optimizer_of(model, name)
        state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        load(state, checkpoint_id=str(folder / f"{model_name} {name}"))
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        train(model, optimizer, range(BEFORE_SAVING, STEPS))
        put(folder, f"{model_name} {name} resumed on {ranks}", whole(model))


def count_collectives(folder: Path) -> None:
    """All reductions of one step, the first and a later one, by how many layers the model has."""
    counts = {}
    for name in BUILD:
        for layers in (1, 3):
            model = sharded(gpt2(layers))
            optimizer = optimizer_of(model, name)
            for step in range(2):
                tokens = torch.arange(16).reshape(2, 8) % 11
                model(input_ids=tokens, labels=tokens).loss.backward()
                with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
                    optimizer.step()
                counts[name, layers, step] = all_reduce.call_count
    put(folder, "collectives", counts)


def put(folder: Path, name: str, value: Any) -> None:
    if dist.get_rank() == 0:
        torch.save(value, folder / f"{name}.pt")


CASES = [("gpt2", name) for name in BUILD if "kahan" not in name]
CASES += [("gpt2 in bfloat16", "AdamW, kahan")]
CASES += [("mixtral", name) for name in ("AdamW", "SGD, tensors", "AdamW, gains")]
CASES += [("mixtral in float32", "AdamW")]
TOLERANCES: dict[str, dict[str, float]] = {
    # Sums over ranks are rounded in another order: 1e-16 a step, which Adam divides by gradients down to about 1e-6.
    "float64": {"rtol": 0.0, "atol": 1e-8},
    # Neurons that are whole on a rank, and gradients that are alike on all: the same numbers, added in the same order.
    "float32": {"rtol": 0.0, "atol": 0.0},
    # What rounds to bfloat16 may then round to its neighbour.
    "bfloat16": {"rtol": 2**-7, "atol": 1e-4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained and saved, and four have gone on from there."""
    path: Path = tmp_path_factory.mktemp("sharded")
    launch(__file__, 2, "train", str(path))
    launch(__file__, 4, "resume", str(path))
    return path


@pytest.mark.parametrize("outcome", ["trained", "resumed on 2", "resumed on 4"])
@pytest.mark.parametrize(("model", "name"), CASES)
def test_equals_one_process(folder: Path, model: str, name: str, outcome: str) -> None:
    found = torch.load(folder / f"{model} {name} {outcome}.pt")
    dtype = model.split(" in ")[1] if " in " in model else "float64"
    torch.testing.assert_close(found, expected(model, name), **TOLERANCES[dtype])


@pytest.mark.parametrize("name", BUILD)
def test_collectives_do_not_grow_with_the_model(folder: Path, name: str) -> None:
    counts = torch.load(folder / "collectives.pt")
    for step in range(2):
        assert 0 < counts[name, 1, step] == counts[name, 3, step]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    task, output = sys.argv[1], Path(sys.argv[2])
    if task == "train":
        train_and_save(output)
        resume(output, 2)
        count_collectives(output)
    else:
        resume(output, dist.get_world_size())
    leave()
