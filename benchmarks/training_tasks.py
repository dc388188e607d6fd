"""What the training experiments learn: from data that come with Python, in seconds to a minute a run."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_rotational.demo.corpus import docstring_dataset, is_validation
from hf_rotational.demo.files import file_dataset
from hf_rotational.demo.model import load_classifier, load_tokenizer, packaged_model
from hf_rotational.errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 with tied embeddings, from scratch, on the source of Python's standard library."""

    width: int = 64
    depth: int = 4
    heads: int = 4
    vocabulary: int = 512
    """Of a byte-level BPE trained on the training text; 256: bytes."""
    length: int = 64
    """Tokens of a row."""
    rows: int = 16
    """Of a batch."""
    held_out_rows: int = 128

    def build(self, seed: int) -> nn.Module:
        set_seed(seed)
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(
            vocab_size=self.vocabulary,
            n_positions=self.length,
            n_embd=self.width,
            n_layer=self.depth,
            n_head=self.heads,
            activation_function="gelu_pytorch_tanh",  # the default's, in one pass
            bos_token_id=0,
            eos_token_id=0,
            **dropout,
        )
        return GPT2LMHeadModel(config)

    def batches(self, seed: int) -> Iterator[Tensor]:
        tokens, generator = source_tokens(self.vocabulary)[0], torch.Generator().manual_seed(1000 + seed)
        while True:
            yield self._rows(tokens, self.rows, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        rows = self._rows(source_tokens(self.vocabulary)[1], self.held_out_rows, torch.Generator().manual_seed(0))
        parts = rows.split(32)
        return {"loss": sum(float(self.loss(model, part)) * len(part) for part in parts) / len(rows)}

    def _rows(self, tokens: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(tokens) - self.length, (rows, 1), generator=generator)
        return tokens[starts + torch.arange(self.length + 1)]


@cache
def source_tokens(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and tokens of the modules that are held out."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts[is_validation(file.name)].append(file.read_text("utf-8", errors="replace"))
    splits = ["".join(texts[held_out]) for held_out in (False, True)]
    if vocabulary == 256:
        train, held_out = (torch.tensor(list(split.encode())) for split in splits)
        return train, held_out
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[False], trainer)
    train, held_out = (torch.tensor(tokenizer.encode(split).ids) for split in splits)
    return train, held_out


@dataclass(frozen=True)
class Classification:
    """A pretrained BERT and a new head, on texts with labels: by default MiniLM and the demo's docstrings."""

    model: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    length: int = 24
    """Tokens of a text that are read."""
    rows: int = 16
    """Of a batch."""

    def build(self, seed: int) -> nn.Module:
        names, _, _, used = classification_data(self)
        model = load_classifier(self.source, load_tokenizer(self.source), list(names), seed)
        if model.config.model_type != "bert":
            raise UserError(f"--model {self.model}: is no BERT but {model.config.model_type}.")
        # Without the rows of tokens that do not occur: they get no gradient, and cost more time than all the others.
        rows = model.get_input_embeddings().weight.detach()[used]
        padding = int(torch.searchsorted(used, model.config.pad_token_id))
        model.set_input_embeddings(nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=padding))
        return model

    def batches(self, seed: int) -> Iterator[Batch]:
        data, generator = classification_data(self)[1], torch.Generator().manual_seed(1000 + seed)
        while True:
            for places in torch.randperm(len(data["labels"]), generator=generator).split(self.rows):
                if len(places) == min(self.rows, len(data["labels"])):
                    yield {name: values[places] for name, values in data.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        data, loss, right = classification_data(self)[2], 0.0, 0
        for places in torch.arange(len(data["labels"])).split(32):
            output = model(**{name: values[places] for name, values in data.items()})
            loss += float(output.loss) * len(places)
            right += int((output.logits.argmax(-1) == data["labels"][places]).sum())
        return {"loss": loss / len(data["labels"]), "accuracy": right / len(data["labels"])}

    @property
    def source(self) -> str | Path:
        return packaged_model() if self.model is None else self.model


@cache
def classification_data(task: Classification) -> tuple[tuple[str, ...], Batch, Batch, Tensor]:
    """Names of the labels, rows to train on and to validate, and the token ids that occur, which the rows number."""
    tokenizer = load_tokenizer(task.source)
    if task.train_file is None:
        data = docstring_dataset()
    else:
        data = file_dataset(task.train_file, task.validation_file, task.text_column, task.label_column)
    splits: list[dict[str, Any]] = [
        tokenizer(
            list(data[split]["text"]),
            truncation=True,
            max_length=task.length,
            padding="max_length",
            return_tensors="pt",
        )
        for split in ("train", "validation")
    ]
    padding = torch.tensor([tokenizer.pad_token_id])
    used = torch.cat([padding, *(split["input_ids"].flatten() for split in splits)]).unique()
    train, validation = (
        {
            "input_ids": torch.searchsorted(used, encoded["input_ids"]),
            "attention_mask": encoded["attention_mask"],
            "labels": torch.tensor(list(data[split]["label"])),
        }
        for encoded, split in zip(splits, ("train", "validation"), strict=True)
    )
    return tuple(data["train"].features["label"].names), train, validation, used
