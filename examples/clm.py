"""Trains a causal language model further on plain text, without warmup.

    python examples/clm.py --model openai-community/gpt2 --dataset Salesforce/wikitext --subset wikitext-2-raw-v1 \
        --learning_rate 5e-5 --num_train_epochs 1 --output_dir out/clm

Folders do as well as names on the Hub: --dataset takes one with a train.txt and, if you have it, a validation.txt.
All training arguments are there, with the rotational ones: --rotation match, --rotation_gains learned, ... (--help).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator

from hf_rotational import RotationalTrainer, RotationalTrainingArguments


@dataclass
class ExampleArguments:
    model: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset: str = field(metadata={"help": "A data set on the Hub, or a folder of text files."})
    subset: str | None = field(default=None, metadata={"help": "Which of the data set's configurations."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    block_size: int = field(default=512, metadata={"help": "Tokens that the model sees at once."})


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, RotationalTrainingArguments))
    example, args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(example.model)
    # Weights of 32 bits, whatever the checkpoint holds; --bf16 computes with 16 of them.
    model = AutoModelForCausalLM.from_pretrained(example.model, dtype=torch.float32)

    def blocks(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Texts one after the other, cut into blocks of equal length."""
        tokens = list(chain.from_iterable(tokenizer(rows[example.text_column])["input_ids"]))
        size = example.block_size
        cut = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": cut, "labels": cut}

    data = load_dataset(example.dataset, example.subset)
    data = data.map(blocks, batched=True, remove_columns=data["train"].column_names)

    trainer = RotationalTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    if "validation" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
