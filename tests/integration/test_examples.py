"""The example scripts learn something from local files, and save it plain."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
    set_seed,
)

from hf_rotational.monitor.records import read_records
from tests.helpers import turned

STEPS = 60
WORDS = ("red", "green", "blue", "one", "two", "three")
SPECIAL = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "eos_token", "mask_token", "sep_token")}
VOCABULARY = {word: place for place, word in enumerate((*SPECIAL.values(), *WORDS))}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2, "vocab_size": len(VOCABULARY)}
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.3,
}
LLAMA = LlamaConfig(**BERT, **IDS)
T5 = T5Config(
    d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0, tie_word_embeddings=False, **IDS
)

SENTENCES = [" ".join((first, second, first)) for first, second in product(WORDS, WORDS)]


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = (SPECIAL["eos_token"], VOCABULARY[SPECIAL["eos_token"]])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def texts(folder: Path) -> None:
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("\n".join(SENTENCES * 2), encoding="utf-8")


def labelled_texts(folder: Path) -> None:
    rows = [f"{sentence},{sentence.split()[0]}" for sentence in SENTENCES]
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(("text,label", *rows)), encoding="utf-8")


def pairs(folder: Path) -> None:
    rows = [json.dumps({"source": text, "target": text.split()[0]}) for text in SENTENCES]
    for split in ("train", "validation"):
        (folder / f"{split}.json").write_text("\n".join(rows), encoding="utf-8")


def conversations(folder: Path) -> None:
    rows = [json.dumps({"text": text}) for text in SENTENCES]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")


def pictures(folder: Path) -> None:
    for split, (label, shade), number in product(("train", "validation"), (("dark", 40), ("light", 200)), range(8)):
        file = folder / split / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), color=shade + number).save(file)


@dataclass(frozen=True)
class Example:
    auto: Any
    """Builds the model, and loads what is saved."""
    config: PreTrainedConfig
    data: Callable[[Path], None]
    """Writes files into a folder."""
    options: tuple[str, ...] = ()


EXAMPLES = {
    "clm": Example(AutoModelForCausalLM, LLAMA, texts, ("--block_size", "8")),
    "mlm": Example(AutoModelForMaskedLM, BertConfig(**BERT, **IDS), texts, ("--mlm_probability", "0.3")),
    "classification": Example(AutoModelForSequenceClassification, BertConfig(**BERT, **IDS), labelled_texts),
    "seq2seq": Example(AutoModelForSeq2SeqLM, T5, pairs, ("--predict_with_generate", "True", "--prefix", "one ")),
    "vit": Example(AutoModelForImageClassification, ViTConfig(**BERT, image_size=8, patch_size=4), pictures),
    "lora_sft": Example(AutoModelForCausalLM, LLAMA, conversations, ("--lora_r", "4", "--bf16", "False")),
}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Runs an example in a folder; returns those of the model it started from and of what it saved."""
    example, model, data, output = EXAMPLES[name], folder / "model", folder / "data", folder / "out"
    data.mkdir()
    example.data(data)
    set_seed(0)
    pretrained = example.auto.from_config(example.config)
    if "Classification" in example.auto.__name__:
        pretrained = pretrained.base_model  # the head is the example's to add
    pretrained.save_pretrained(model)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}) if name == "vit" else words()
    processor.save_pretrained(model)
    folders = ["--model", str(model), "--dataset", str(data), "--output_dir", str(output)]
    steps = ["--max_steps", str(STEPS), "--learning_rate", "2e-2", "--weight_decay", "1"]
    quiet = ["--use_cpu", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True"]
    measured = ["--logging_steps", "1", "--rotation_logging_steps", "1"]
    arguments = [*folders, *steps, *quiet, *measured, *example.options]
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    importlib.import_module(f"examples.{name}").main()
    return model, output


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns_at_its_angle_and_saves_what_plain_transformers_load(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    start, output = run(name, tmp_path, monkeypatch)
    auto = EXAMPLES[name].auto

    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert any("eval_loss" in entry for entry in history)

    first, *_, last = read_records(output).steps
    if name == "lora_sft":
        assert all("lora_A" in path for path in first["layers"])
        assert last["rotation"] == pytest.approx(last["target"], rel=0.5)  # the first step waits for B to leave 0
        adapted = peft.PeftModel.from_pretrained(auto.from_pretrained(start), output)
        learned = [weight for path, weight in adapted.named_parameters() if "lora_B" in path]
        assert all(weight.any() for weight in learned)
        return
    assert first["rotation"] == pytest.approx(first["target"], rel=1e-3)  # the first step is atan(target), in float32
    saved, info = auto.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before = dict(auto.from_pretrained(start).named_parameters())
    for path in first["layers"]:
        old, new = (rows.flatten(1) for rows in (before[path], saved.get_parameter(path)))
        assert turned(old, new).min() > 0
        # float32 rounds a norm by up to 6e-8 a step.
        torch.testing.assert_close(new.norm(dim=1), old.norm(dim=1), rtol=1e-5, atol=0.0)
