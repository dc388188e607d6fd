"""The Trainer and its arguments."""

from hf_rotational.training.arguments import RotationalTrainingArguments
from hf_rotational.training.trainer import RotationalSeq2SeqTrainer, RotationalTrainer, RotationalTrainerMixin

__all__ = ["RotationalSeq2SeqTrainer", "RotationalTrainer", "RotationalTrainerMixin", "RotationalTrainingArguments"]
