"""Rotational optimizers."""

from hf_rotational.optim.factory import OPTIMIZERS, RotationalOptimizerFactory
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.optimizers import RotationalAdamW

__all__ = ["OPTIMIZERS", "RotationalAdamW", "RotationalOptimizer", "RotationalOptimizerFactory"]
