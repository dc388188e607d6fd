"""The Trainer and its arguments."""

from hf_rotational.training.arguments import RotationalTrainingArguments
from hf_rotational.training.trainer import RotationalTrainer, RotationalTrainerMixin

__all__ = ["RotationalTrainer", "RotationalTrainerMixin", "RotationalTrainingArguments"]
