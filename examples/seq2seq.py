"""Fine-tunes a model that turns one text into another, such as a summary or a translation, without warmup.

    python examples/seq2seq.py --model google-t5/t5-small --dataset EdinburghNLP/xsum --source_column document \
        --target_column summary --prefix "summarize: " --learning_rate 1e-4 --predict_with_generate True \
        --output_dir out/seq2seq

Folders do as well as names on the Hub: --dataset takes one with a train.json and, if you have it, a validation.json.
All training arguments are there, with the rotational ones: --rotation match, --rotation_gains learned, ... (--help).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser
from transformers import Seq2SeqTrainingArguments as Stock

from hf_rotational import RotationalSeq2SeqTrainer, RotationalTrainingArguments


@dataclass
class ExampleArguments:
    model: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset: str = field(metadata={"help": "A data set on the Hub, or a folder of csv or json files."})
    subset: str | None = field(default=None, metadata={"help": "Which of the data set's configurations."})
    source_column: str = field(default="source", metadata={"help": "Column with what is read."})
    target_column: str = field(default="target", metadata={"help": "Column with what is to be written."})
    prefix: str = field(default="", metadata={"help": "Put before every source."})
    max_length: int = field(default=256, metadata={"help": "Tokens after which a text is cut off."})


@dataclass
class Seq2SeqArguments(RotationalTrainingArguments, Stock):
    """Both: rotation's, and those about generating."""


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, Seq2SeqArguments))
    example, args = parser.parse_args_into_dataclasses()

    tokenizer = AutoTokenizer.from_pretrained(example.model)
    # Weights of 32 bits, whatever the checkpoint holds; --bf16 computes with 16 of them.
    model = AutoModelForSeq2SeqLM.from_pretrained(example.model, dtype=torch.float32)

    def tokens(rows: dict[str, list[str]]) -> dict[str, Any]:
        sources = [example.prefix + source for source in rows[example.source_column]]
        targets = rows[example.target_column]
        return tokenizer(sources, text_target=targets, truncation=True, max_length=example.max_length)

    data = load_dataset(example.dataset, example.subset)
    data = data.map(tokens, batched=True, remove_columns=data["train"].column_names)

    trainer = RotationalSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    )
    trainer.train()
    if "validation" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
