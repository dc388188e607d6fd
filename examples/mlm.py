"""Trains a masked language model further on plain text, without warmup.

    python examples/mlm.py --model google-bert/bert-base-uncased --dataset Salesforce/wikitext \
        --subset wikitext-2-raw-v1 --learning_rate 5e-5 --num_train_epochs 1 --output_dir out/mlm

Folders do as well as names on the Hub: --dataset takes one with a train.txt and, if you have it, a validation.txt.
All training arguments are there, with the rotational ones: --rotation match, --rotation_gains learned, ... (--help).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

from hf_rotational import RotationalTrainer, RotationalTrainingArguments


@dataclass
class ExampleArguments:
    model: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset: str = field(metadata={"help": "A data set on the Hub, or a folder of text files."})
    subset: str | None = field(default=None, metadata={"help": "Which of the data set's configurations."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    max_length: int = field(default=256, metadata={"help": "Tokens after which a text is cut off."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens to predict."})


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, RotationalTrainingArguments))
    example, args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(example.model)
    # Weights of 32 bits, whatever the checkpoint holds; --bf16 computes with 16 of them.
    model = AutoModelForMaskedLM.from_pretrained(example.model, dtype=torch.float32)

    def tokens(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [text for text in rows[example.text_column] if text.strip()]
        return tokenizer(texts, truncation=True, max_length=example.max_length, return_special_tokens_mask=True)

    data = load_dataset(example.dataset, example.subset)
    data = data.map(tokens, batched=True, remove_columns=data["train"].column_names)

    trainer = RotationalTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=example.mlm_probability),
    )
    trainer.train()
    if "validation" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
