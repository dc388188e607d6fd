"""What ``hf-rotational demo`` can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hf_rotational.errors import UserError


@dataclass(frozen=True)
class DemoArguments:
    """Model, data and length of the demo. Raises ``UserError`` for a value that cannot be used, naming it."""

    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of a model; by default all-MiniLM-L6-v2, which the demo extra installs."},
    )
    train_file: str | None = field(
        default=None, metadata={"help": "csv or json file to train on, instead of the standard library's docstrings."}
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "csv or json file to evaluate on; by default a fifth of train_file."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the files that holds the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the files that holds the labels."})
    output_dir: str = field(
        default="rotational-demo",
        metadata={"help": "Folder for the result; new, empty, or of an earlier demo, which is then overwritten."},
    )
    max_steps: int = field(default=250, metadata={"help": "Optimizer steps of each of the two runs."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Texts per step and device."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of both runs."})
    max_length: int = field(default=32, metadata={"help": "Tokens of a text that are read; what follows is cut."})
    seed: int = field(default=42, metadata={"help": "Decides the new classifier, the order of the texts and dropout."})

    def __post_init__(self) -> None:
        for name, lowest in (("max_steps", 1), ("per_device_train_batch_size", 1), ("max_length", 3), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"--{name} {getattr(self, name)}: has to be at least {lowest}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"--learning_rate {self.learning_rate}: has to be a positive number.")
        if self.train_file is None:
            for name, default in (("validation_file", None), ("text_column", "text"), ("label_column", "label")):
                if getattr(self, name) != default:
                    raise UserError(f"--{name} {getattr(self, name)}: needs --train_file.")
