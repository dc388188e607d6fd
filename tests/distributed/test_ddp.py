"""Data parallel: several ranks on parts of a batch take the steps of one process on all of it.

Run as a script, this file is what each of the ranks does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_rotational import RotationalAdamW, RotationalTrainer, RotationalTrainingArguments, plan
from tests.distributed.ranks import launch, leave

LENGTH = 8
# Sums over ranks round in another order: 1e-16, which Adam divides by gradients down to 1e-8.
TOLERANCE = 1e-8
CASES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Lion with gains": {"optim": "rotational_lion", "rotation_gains": "learned", "rotation_centering": "updates"},
    # Three batches an epoch, two a step: the second step of an epoch has one.
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 4, "max_grad_norm": 0.0},
}


def model() -> GPT2LMHeadModel:
    set_seed(0)
    config = GPT2Config(
        n_embd=8,
        n_layer=1,
        n_head=2,
        vocab_size=11,
        n_positions=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,  # ranks would draw dropout apart
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    trained = GPT2LMHeadModel(config).double()
    trained.transformer.h[0].attn.c_attn.bias.requires_grad_(False)  # a key's has no gradient but rounding
    return trained


def texts() -> Dataset:
    # Rows end in padding of their own lengths, so that ranks see different numbers of tokens.
    rows = [[(3 * row + 7 * column) % 11 for column in range(LENGTH)] for row in range(12)]
    labels = [tokens[: LENGTH - row % 4] + [-100] * (row % 4) for row, tokens in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def train(folder: str, name: str, ranks: int) -> list[Tensor]:
    """Weights after a run of RotationalTrainer."""
    settings = {"learning_rate": 1e-2, "max_steps": 6, "rotation_logging_steps": 0, **CASES[name]}
    trainer = RotationalTrainer(
        model=model(),
        args=RotationalTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=4 // ranks,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=texts(),
    )
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def loop(rank: int, ranks: int) -> list[Tensor]:
    """Weights after a loop over one's own, unequal share of 7 rows."""
    trained = model()
    wrapped = DistributedDataParallel(trained) if ranks > 1 else trained
    optimizer = RotationalAdamW(plan(trained).parameter_groups(), lr=1e-2, weight_decay=0.1, gains="learned")
    tokens = torch.tensor(texts()["input_ids"][:7])
    share = tokens[rank::ranks]
    for _ in range(5):
        # DDP averages over ranks, whose shares count by their rows.
        (wrapped(input_ids=share, labels=share).loss * len(share) * ranks / len(tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in trained.parameters()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two and four ranks have left their weights."""
    path: Path = tmp_path_factory.mktemp("ddp")
    for ranks in (2, 4):
        launch(__file__, ranks, str(path))
    return path


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_trainer_on_ranks_equals_one_process(folder: Path, tmp_path: Path, name: str, ranks: int) -> None:
    alone = train(str(tmp_path), name, 1)
    for rank in range(ranks):
        together = torch.load(folder / f"{name} {rank} of {ranks}.pt")
        torch.testing.assert_close(together, alone, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_unequal_shares_of_a_batch_equal_one_process(folder: Path, ranks: int) -> None:
    alone = loop(0, 1)
    for rank in range(ranks):
        together = torch.load(folder / f"loop {rank} of {ranks}.pt")
        torch.testing.assert_close(together, alone, rtol=0.0, atol=TOLERANCE)


if __name__ == "__main__":
    output = Path(sys.argv[1])
    for case in CASES:
        weights = train(str(output), case, int(os.environ["WORLD_SIZE"]))
        torch.save(weights, output / f"{case} {dist.get_rank()} of {dist.get_world_size()}.pt")
    torch.save(
        loop(dist.get_rank(), dist.get_world_size()), output / f"loop {dist.get_rank()} of {dist.get_world_size()}.pt"
    )
    leave()
