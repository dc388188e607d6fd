"""Rotational optimizers for Hugging Face Transformers: fine-tune without warmup, layers turning in balance."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_rotational import equilibrium
    from hf_rotational.monitor.callback import RotationMonitor
    from hf_rotational.neurons import RotationPlan, plan
    from hf_rotational.optim.config import RotationalConfig
    from hf_rotational.optim.factory import RotationalOptimizerFactory
    from hf_rotational.optim.optimizers import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD
    from hf_rotational.optim.wrap import rotational
    from hf_rotational.standardize.modules import fold, standardize
    from hf_rotational.training.arguments import RotationalTrainingArguments
    from hf_rotational.training.trainer import RotationalSeq2SeqTrainer, RotationalTrainer, RotationalTrainerMixin

__version__ = "0.1.0"

# Imported on first use: an optimizer should not cost the import of the Trainer, nor the Trainer that of a plot.
_HOME = {
    "RotationMonitor": "monitor.callback",
    "RotationPlan": "neurons",
    "RotationalAdam": "optim.optimizers",
    "RotationalAdamW": "optim.optimizers",
    "RotationalConfig": "optim.config",
    "RotationalLion": "optim.optimizers",
    "RotationalOptimizerFactory": "optim.factory",
    "RotationalSGD": "optim.optimizers",
    "RotationalSeq2SeqTrainer": "training.trainer",
    "RotationalTrainer": "training.trainer",
    "RotationalTrainerMixin": "training.trainer",
    "RotationalTrainingArguments": "training.arguments",
    "fold": "standardize.modules",
    "plan": "neurons",
    "rotational": "optim.wrap",
}

__all__ = [
    "RotationMonitor",
    "RotationPlan",
    "RotationalAdam",
    "RotationalAdamW",
    "RotationalConfig",
    "RotationalLion",
    "RotationalOptimizerFactory",
    "RotationalSGD",
    "RotationalSeq2SeqTrainer",
    "RotationalTrainer",
    "RotationalTrainerMixin",
    "RotationalTrainingArguments",
    "equilibrium",
    "fold",
    "plan",
    "rotational",
    "standardize",
]


def __getattr__(name: str) -> Any:
    if name in ("equilibrium", "standardize"):
        return importlib.import_module(f"hf_rotational.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"hf_rotational.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
