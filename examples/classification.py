"""Fine-tunes a text classifier, without warmup.

    python examples/classification.py --model google-bert/bert-base-uncased --dataset stanfordnlp/sst2 \
        --text_column sentence --learning_rate 5e-5 --num_train_epochs 1 --output_dir out/classification

Folders do as well as names on the Hub: --dataset takes one with a train.csv and, if you have it, a validation.csv.
All training arguments are there, with the rotational ones: --rotation match, --rotation_gains learned, ... (--help).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, Value, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, HfArgumentParser

from hf_rotational import RotationalTrainer, RotationalTrainingArguments


@dataclass
class ExampleArguments:
    model: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset: str = field(metadata={"help": "A data set on the Hub, or a folder of csv or json files."})
    subset: str | None = field(default=None, metadata={"help": "Which of the data set's configurations."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    label_column: str = field(default="label", metadata={"help": "Column with its label."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut off."})


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, RotationalTrainingArguments))
    example, args = parser.parse_args_into_dataclasses()

    data, column = load_dataset(example.dataset, example.subset), example.label_column
    if not isinstance(data["train"].features[column], ClassLabel):  # a csv file's labels are only words or numbers
        names = sorted(str(label) for label in data["train"].unique(column))
        data = data.cast_column(column, Value("string")).cast_column(column, ClassLabel(names=names))
    names = data["train"].features[column].names

    tokenizer = AutoTokenizer.from_pretrained(example.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        example.model,
        id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a head for other labels is replaced
        dtype=torch.float32,  # whatever the checkpoint holds; --bf16 computes with 16 bits
    )

    def tokens(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts, labels = rows[example.text_column], rows[column]
        return {**tokenizer(texts, truncation=True, max_length=example.max_length), "labels": labels}

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    data = data.map(tokens, batched=True, remove_columns=data["train"].column_names)

    trainer = RotationalTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    trainer.train()
    if "validation" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
