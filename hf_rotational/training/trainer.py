"""The Trainer that builds a rotational optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer

from hf_rotational.optim.factory import OPTIMIZERS, RotationalOptimizerFactory, factory_kwargs
from hf_rotational.optim.optimizer import RotationalOptimizer

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RotationalTrainerMixin(_Base):
    """Makes any Trainer rotational: ``class MyTrainer(RotationalTrainerMixin, SFTTrainer)``.

    Builds the optimizer named by ``args.optim`` where that is a rotational one, and logs the target angle
    (``rotation_target``, radians per step) beside the loss. Everything else is the Trainer's, so with another
    ``optim``, or with an optimizer passed in, it trains as the class it is mixed into.
    """

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Builds the optimizer; see :class:`~hf_rotational.RotationalOptimizerFactory` for what it raises."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and str(self.args.optim) in OPTIMIZERS:
            opt_model: nn.Module = self.model if model is None else model  # type: ignore[assignment]
            decays = frozenset(self.get_decay_parameter_names(opt_model))
            self.optimizer = RotationalOptimizerFactory()(
                opt_model, decays=decays.__contains__, **factory_kwargs(self.args)
            )
            return self.optimizer
        return super().create_optimizer(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the target angle to what is logged with the loss."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if "learning_rate" in logs and isinstance(optimizer, RotationalOptimizer):
            # The schedule has moved on already: what is logged belongs to the learning rate logged with it.
            used = {"lr": logs["learning_rate"]}
            rotating = [group for group in optimizer.param_groups if group["rotational"]]
            logs["rotation_target"] = max(optimizer.target_rotation({**group, **used}) for group in rotating)
        super().log(logs, start_time)


class RotationalTrainer(RotationalTrainerMixin, Trainer):
    """``transformers.Trainer`` with a rotational optimizer.

    Example::

        args = RotationalTrainingArguments(output_dir="out", learning_rate=5e-5)
        RotationalTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train()
    """
