"""Trains an encoder-decoder, in the style of Transformers' run_summarization.py, with classes of the script's own."""

import os
import sys
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForSeq2SeqLM, HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The checkpoint to start from."})


@dataclass
class ScriptArguments(Seq2SeqTrainingArguments):
    number_of_rows: int = field(default=16, metadata={"help": "Rows to train on."})


class ScriptTrainer(Seq2SeqTrainer):
    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs)


def main():
    parser = HfArgumentParser((ModelArguments, ScriptArguments))
    if sys.argv[1].endswith(".yaml"):
        model_args, training_args = parser.parse_yaml_file(os.path.abspath(sys.argv[1]))
    else:
        model_args, training_args = parser.parse_args_into_dataclasses()

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 28, (training_args.number_of_rows, 6), generator=generator)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = ScriptTrainer(
        model=AutoModelForSeq2SeqLM.from_pretrained(model_args.model_name_or_path),
        args=training_args,
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    if training_args.predict_with_generate:
        trainer.save_metrics("eval", trainer.evaluate(max_length=8))


if __name__ == "__main__":
    main()
