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
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    get_scheduler,
    set_seed,
)

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

    def tokens(self) -> tuple[Tensor, Tensor]:
        """To train on, and held out."""
        return source_tokens(self.vocabulary, standard_library())

    def batches(self, seed: int) -> Iterator[Tensor]:
        tokens, generator = self.tokens()[0], torch.Generator().manual_seed(1000 + seed)
        while True:
            yield self._rows(tokens, self.rows, generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(input_ids=batch[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        rows = self._rows(self.tokens()[1], self.held_out_rows, torch.Generator().manual_seed(0))
        parts = rows.split(32)
        return {"loss": sum(float(self.loss(model, part)) * len(part) for part in parts) / len(rows)}

    def _rows(self, tokens: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(tokens) - self.length, (rows, 1), generator=generator)
        return tokens[starts + torch.arange(self.length + 1)]


@dataclass(frozen=True)
class InstalledSources(LanguageModel):
    """A GPT-2 of 124 million parameters, from scratch, bfloat16 by autocast, on all Python sources installed."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    vocabulary: int = 50257
    length: int = 1024
    rows: int = 32
    device: str = "cuda"

    def build(self, seed: int) -> nn.Module:
        return super().build(seed).to(self.device)

    def tokens(self) -> tuple[Tensor, Tensor]:
        return source_tokens(self.vocabulary, installed_files())

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16):
            return super().loss(model, batch.to(self.device))


@cache
def standard_library() -> tuple[Path, ...]:
    """Its modules, without packages."""
    return tuple(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))


@cache
def installed_files() -> tuple[Path, ...]:
    """Every Python file of the standard library and of the packages installed."""
    folders = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    return tuple(sorted({file for folder in folders for file in folder.rglob("*.py")}))


FILES_AT_ONCE = 512
"""Of a text that is tokenized in one piece; more than the standard library's modules are."""


@cache
def source_tokens(vocabulary: int, files: tuple[Path, ...]) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and tokens of the files that are held out: by name, so that copies are on one side."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for file in files:
        texts[is_validation(file.name)].append(file.read_text("utf-8", errors="replace"))
    splits = [
        ["".join(part[start : start + FILES_AT_ONCE]) for start in range(0, len(part), FILES_AT_ONCE)]
        for part in (texts[False], texts[True])
    ]
    if vocabulary == 256:
        train, held_out = (torch.tensor(list("".join(split).encode())) for split in splits)
        return train, held_out
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts[False], trainer)
    train, held_out = (
        torch.cat([torch.tensor(tokenizer.encode(text).ids, dtype=torch.long) for text in split]) for split in splits
    )
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
        return shuffled(classification_data(self)[1], self.rows, 1000 + seed)

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


@dataclass(frozen=True)
class LoraClassification(Classification):
    """The same with everything frozen but low-rank adapters of the attention's queries and values, and the head."""

    rank: int = 8
    alpha: int = 16

    def build(self, seed: int) -> nn.Module:
        from peft import LoraConfig, TaskType, get_peft_model

        options = {"r": self.rank, "lora_alpha": self.alpha, "target_modules": ["query", "value"]}
        return get_peft_model(super().build(seed), LoraConfig(task_type=TaskType.SEQ_CLS, **options))


@dataclass(frozen=True)
class Images:
    """A small ViT, pretrained here on scikit-learn's handwritten digits 0 to 4, with a new head for 5 to 9."""

    width: int = 64
    depth: int = 4
    heads: int = 4
    pretraining_steps: int = 600
    rows: int = 16
    """Of a batch."""

    def build(self, seed: int) -> nn.Module:
        set_seed(seed)
        model = self.untrained()
        weights = pretrained_weights(self)
        model.load_state_dict({**model.state_dict(), **{n: w for n, w in weights.items() if "classifier" not in n}})
        return model

    def untrained(self) -> PreTrainedModel:
        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=5,
        )
        return ViTForImageClassification(config)

    def batches(self, seed: int) -> Iterator[Batch]:
        return shuffled(digits(5)[0], self.rows, 1000 + seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        data = digits(5)[1]
        output = model(**data)
        right = (output.logits.argmax(-1) == data["labels"]).float()
        return {"loss": float(output.loss), "accuracy": float(right.mean())}


@cache
def digits(first: int) -> tuple[Batch, Batch]:
    """Images of five digits, labelled from 0, to train on and to validate: every fifth."""
    from sklearn.datasets import load_digits

    stored = load_digits()
    images = torch.tensor(stored.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    labels = torch.tensor(stored.target) - first
    chosen = ((labels >= 0) & (labels < 5)).nonzero().flatten()
    held_out = torch.arange(len(chosen)) % 5 == 4
    train, validation = (
        {"pixel_values": images[part], "labels": labels[part]} for part in (chosen[~held_out], chosen[held_out])
    )
    return train, validation


@cache
def pretrained_weights(task: Images) -> dict[str, Tensor]:
    """The checkpoint: AdamW with warmup on the digits 0 to 4, always the same. Ten seconds, once in a process."""
    set_seed(0)
    model = task.untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = get_scheduler("linear", optimizer, task.pretraining_steps // 10, task.pretraining_steps)
    batches = shuffled(digits(0)[0], 2 * task.rows, 0)
    for _ in range(task.pretraining_steps):
        task.loss(model, next(batches)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.state_dict()


def shuffled(data: Batch, rows: int, seed: int) -> Iterator[Batch]:
    """Batches of so many rows (all, if there are fewer), in a new order every epoch."""
    count, generator = len(data["labels"]), torch.Generator().manual_seed(seed)
    while True:
        for places in torch.randperm(count, generator=generator).split(rows):
            if len(places) == min(rows, count):
                yield {name: values[places] for name, values in data.items()}
