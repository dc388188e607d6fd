"""Fine-tunes an image classifier, without warmup.

    python examples/vit.py --model google/vit-base-patch16-224-in21k --dataset AI-Lab-Makerere/beans \
        --label_column labels --learning_rate 5e-5 --num_train_epochs 3 --output_dir out/vit

Folders do as well as names on the Hub: --dataset takes one with a train and, if you have it, a validation folder, in
each of which every class has a folder with its pictures.
All training arguments are there, with the rotational ones: --rotation match, --rotation_gains learned, ... (--help).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, HfArgumentParser

from hf_rotational import RotationalTrainer, RotationalTrainingArguments


@dataclass
class ExampleArguments:
    model: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset: str = field(metadata={"help": "A data set on the Hub, or a folder of images."})
    subset: str | None = field(default=None, metadata={"help": "Which of the data set's configurations."})
    image_column: str = field(default="image", metadata={"help": "Column with the picture."})
    label_column: str = field(default="label", metadata={"help": "Column with its label."})


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, RotationalTrainingArguments))
    example, args = parser.parse_args_into_dataclasses()
    args.remove_unused_columns = False  # the pictures: pixels are made of them when a batch is

    data = load_dataset(example.dataset, example.subset)
    names = data["train"].features[example.label_column].names
    processor = AutoImageProcessor.from_pretrained(example.model)
    model = AutoModelForImageClassification.from_pretrained(
        example.model,
        id2label=dict(enumerate(names)),
        label2id={name: place for place, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a head for other labels is replaced
        dtype=torch.float32,  # whatever the checkpoint holds; --bf16 computes with 16 bits
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor([row[example.image_column].convert("RGB") for row in rows], return_tensors="pt")
        return {**pixels, "labels": torch.tensor([row[example.label_column] for row in rows])}

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = RotationalTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=processor,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    trainer.train()
    if "validation" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
