"""The Trainer and its arguments."""

from hf_rotational.compat import check_transformers

check_transformers()  # before what an unsupported release would stumble over

# ruff: noqa: E402
from hf_rotational.training.arguments import RotationalTrainingArguments
from hf_rotational.training.trainer import RotationalSeq2SeqTrainer, RotationalTrainer, RotationalTrainerMixin

__all__ = ["RotationalSeq2SeqTrainer", "RotationalTrainer", "RotationalTrainerMixin", "RotationalTrainingArguments"]
