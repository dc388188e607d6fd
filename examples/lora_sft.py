"""Fine-tunes LoRA adapters of a language model on conversations or texts, with trl's trainer and without warmup.

    python examples/lora_sft.py --model Qwen/Qwen2.5-0.5B --dataset trl-lib/Capybara --learning_rate 2e-4 \
        --num_train_epochs 1 --output_dir out/lora

Needs `pip install trl peft`. Folders do as well as names on the Hub: --dataset takes one with a train.jsonl (a column
"text" or "messages") and, if you have it, a test.jsonl. Of each adapter the matrix A rotates; B, which starts at 0,
takes AdamW's step.
All of trl's arguments are there, with the rotational ones: --rotation match, --rotation_gains learned, ... (--help).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from hf_rotational import RotationalTrainerMixin, RotationalTrainingArguments


@dataclass
class ExampleArguments:
    model: str = field(metadata={"help": "A model on the Hub, or a folder."})
    dataset: str = field(metadata={"help": "A data set on the Hub, or a folder of csv or json files."})
    subset: str | None = field(default=None, metadata={"help": "Which of the data set's configurations."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters, times the rank."})


@dataclass
class SFTArguments(SFTConfig, RotationalTrainingArguments):
    """Both: trl's, with its defaults, and rotation's."""

    optim: str = field(default="rotational_adamw", metadata={"help": "The optimizer."})


class RotationalSFTTrainer(RotationalTrainerMixin, SFTTrainer):
    pass


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, SFTArguments))
    example, args = parser.parse_args_into_dataclasses()

    data = load_dataset(example.dataset, example.subset)
    trainer = RotationalSFTTrainer(
        # Weights of 32 bits, whatever the checkpoint holds; trl computes with 16 of them where it can (--bf16).
        model=AutoModelForCausalLM.from_pretrained(example.model, dtype=torch.float32),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("test"),
        processing_class=AutoTokenizer.from_pretrained(example.model),
        peft_config=LoraConfig(r=example.lora_r, lora_alpha=example.lora_alpha, target_modules="all-linear"),
    )
    trainer.train()
    if "test" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()  # the adapters; model.merge_and_unload() puts them into the model
    trainer.save_state()


if __name__ == "__main__":
    main()
