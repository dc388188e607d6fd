"""The Trainer on sharded models: FSDP2 by Accelerate, tensor and expert parallel models by transformers.

Run as a script, this file is what each of the ranks does.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    set_seed,
)

from hf_rotational import RotationalTrainer, RotationalTrainingArguments
from tests.distributed.ranks import launch, leave

STEPS, BATCH, WORDS = 6, 8, 40
STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
FULLY_SHARDED = [f"{kind}{how}" for kind in STATE_DICTS for how in ("", ", standardized")]
PARALLEL: dict[str, dict[str, Any]] = {
    "llama on tensor parallel ranks": {"tp_size": 2},
    "mixtral on tensor parallel ranks": {"tp_size": 2},
    "mixtral on expert parallel ranks": {"tp_size": 2, "ep_size": 2},
}
ROTATIONAL: dict[str, Any] = {
    "rotation_gains": "learned",
    "rotation_centering": "updates",
    "rotation_logging_steps": 2,
}
# Adam would turn the rounding of gradients that are 0, as those of means behind a new LayerNorm, into whole steps.
STANDARDIZED: dict[str, Any] = {
    "optim": "sgd",
    "optim_args": "momentum=0.9",
    "weight_standardization": "function_preserving",
}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "vocab_size": WORDS,
}


def model(name: str) -> PreTrainedModel:
    set_seed(0)
    if name == "gpt2":  # neurons of its Conv1D are columns, which shards cut; embedding and head are tied
        config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=WORDS, n_positions=8, resid_pdrop=0.0)
        config.embd_pdrop = config.attn_pdrop = 0.0  # ranks would draw dropout apart
        trained: PreTrainedModel = GPT2LMHeadModel(config)
        trained.transformer.h[0].attn.c_attn.bias.requires_grad_(False)  # a key's has no gradient but rounding
    elif name == "llama":
        trained = LlamaForCausalLM(LlamaConfig(**SMALL))
    else:  # the other implementations of experts have no float64
        trained = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, experts_implementation="eager"))
    return trained.double()


def arguments(folder: Path, batch: int, standardized: bool = False, **settings: Any) -> RotationalTrainingArguments:
    own = STANDARDIZED if standardized else ROTATIONAL
    return RotationalTrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        **own,
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )


def train(trained: nn.Module, args: RotationalTrainingArguments, resume: str | None = None) -> RotationalTrainer:
    rows = [[(7 * row + column**2) % WORDS for column in range(6)] for row in range(64)]
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = RotationalTrainer(model=trained, args=args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def pretend_gpus(args: RotationalTrainingArguments) -> None:
    """Accelerate shards nothing on CPUs, without a word, unless it takes them for GPUs."""
    _ = args.device  # sets the state up
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def train_fully_sharded(folder: Path, case: str, resume: str | None = None) -> list[Tensor]:
    kind, *how = case.split(", ")
    config = {"state_dict_type": kind, "version": 2, "transformer_layer_cls_to_wrap": "GPT2Block"}
    batch = BATCH // dist.get_world_size()
    args = arguments(folder / case, batch, standardized=bool(how), fsdp="full_shard", fsdp_config=config)
    pretend_gpus(args)
    trainer = train(model("gpt2"), args, resume)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return whole(trainer.model)


def train_parallel(folder: Path, name: str) -> list[Tensor]:
    from transformers.distributed import DistributedConfig

    args = arguments(folder, BATCH, save_strategy="no")  # these ranks share a batch, and the Trainer resumes none
    pretend_gpus(args)
    path, config = folder / name.split()[0], DistributedConfig(**PARALLEL[name])
    build = LlamaForCausalLM if "llama" in name else MixtralForCausalLM
    trained = build.from_pretrained(
        path, dtype=torch.float64, distributed_config=config, experts_implementation="eager"
    )
    trainer = train(trained, args)
    assert any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return whole(trainer.model)


def whole(trained: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in trained.parameters()]


def put(folder: Path, name: str, tensors: list[Tensor]) -> None:
    if dist.get_rank() == 0:
        torch.save(tensors, folder / f"{name}.pt")


def has_distributed_config() -> bool:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return "ep_size" in DistributedConfig.__dataclass_fields__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained, saved and resumed, and four have resumed what two had saved."""
    path: Path = tmp_path_factory.mktemp("trainer")
    for name in ("llama", "mixtral"):
        model(name).save_pretrained(path / name)
    launch(__file__, 2, "train", str(path))
    launch(__file__, 4, "resume", str(path))
    return path


@cache
def expected(name: str, folder: Path, standardized: bool = False) -> list[Tensor]:
    """What one process arrives at."""
    return whole(train(model(name), arguments(folder, BATCH, standardized, save_strategy="no")).model)


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    # Sums over ranks are rounded in another order: 1e-16 a step, which Adam divides by gradients down to about 1e-6.
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("outcome", ["trained on 2", "resumed on 2", "resumed on 4"])
@pytest.mark.parametrize("case", FULLY_SHARDED)
def test_fully_sharded_training_equals_one_process(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, case: str, outcome: str
) -> None:
    found = torch.load(folder / f"{case} {outcome}.pt")
    close(found, expected("gpt2", tmp_path_factory.getbasetemp() / "alone", standardized="standardized" in case))


@pytest.mark.skipif(not has_distributed_config(), reason="this transformers does not parallelize experts itself")
@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_models_train_as_whole_ones(folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    close(torch.load(folder / f"{name}.pt"), expected(name.split()[0], tmp_path_factory.getbasetemp() / "alone"))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    task, output = sys.argv[1], Path(sys.argv[2])
    if task == "train" and has_distributed_config():  # first: Accelerate leaves it in the environment that it has FSDP
        for case in PARALLEL:
            put(output, case, train_parallel(output, case))
    for case in FULLY_SHARDED:
        if task == "train":
            put(output, f"{case} trained on 2", train_fully_sharded(output, case))
        saved = str(output / case / f"checkpoint-{STEPS // 2}")
        put(output, f"{case} resumed on {dist.get_world_size()}", train_fully_sharded(output, case, saved))
    leave()
