"""The Trainer that builds a rotational optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_rotational.hub import trainer as hub
from hf_rotational.optim.factory import OPTIMIZERS, RotationalOptimizerFactory, factory_kwargs, optim_name
from hf_rotational.training import behavior
from hf_rotational.training.arguments import RotationalTrainingArguments

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class RotationalTrainerMixin(_Base):
    """Makes any Trainer rotational: ``class MyTrainer(RotationalTrainerMixin, SFTTrainer)``.

    Builds the optimizer named by ``args.optim`` where that is a rotational one, and RotationalAdamW with its defaults
    where ``args`` are no :class:`~hf_rotational.RotationalTrainingArguments` and name none. Attaches a
    :class:`~hf_rotational.RotationMonitor` (one in ``callbacks``, or one of its own by
    ``args.rotation_logging_steps``). Standardizes the model by ``args.weight_standardization`` when training begins.
    Resumes exactly, or refuses a checkpoint that is damaged, incomplete or another model's, unless the class has
    checkpoints of its own (``SentenceTransformerTrainer``, whose losses are trained with the model). Everything else is
    the Trainer's, so with another ``optim``, or with an optimizer passed in, it trains as the class it is mixed into.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        behavior.init(self, super().__init__, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Builds the optimizer; see :class:`~hf_rotational.RotationalOptimizerFactory` for what it raises."""
        optim = self._rotational_optim()
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None and optim is not None:
            opt_model: nn.Module = self.model if model is None else model  # type: ignore[assignment]
            trained, settings = behavior.with_losses(self, opt_model), factory_kwargs(self.args, optim)
            if trained is not opt_model:
                settings["exclude"] = (*settings.get("exclude", ()), "^loss_")
            decays = frozenset(self.get_decay_parameter_names(trained))
            self.optimizer = RotationalOptimizerFactory()(trained, decays=decays.__contains__, **settings)
            return self.optimizer
        return super().create_optimizer(model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; with ``resume_from_checkpoint=True`` on from the latest checkpoint that is complete."""
        return behavior.train(self, super().train, resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves a plain model; in checkpoints, what resuming a standardized one takes is put beside it."""
        behavior.save_model(self, super().save_model, output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        behavior.save_optimizer_and_scheduler(self, super()._save_optimizer_and_scheduler, output_dir)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        return behavior.inner_training_loop(self, super()._inner_training_loop, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        behavior.run_epoch(self, super()._run_epoch, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *model: Any) -> None:
        if behavior.loads_as_trainer(super()):
            behavior.load_from_checkpoint(self, super()._load_from_checkpoint, resume_from_checkpoint, *model)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, *model)

    def _load_best_model(self) -> None:
        if behavior.loads_as_trainer(super()):
            behavior.load_best_model(self, super()._load_best_model)
        else:
            super()._load_best_model()

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Opens the repository on the Hub; raises ``UserError`` where there is none to be had."""
        hub.init_hf_repo(self, super().init_hf_repo, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Uploads model, tokenizer, arguments, records and card: no tokens, and no paths of this machine."""
        return hub.push_to_hub(self, super().push_to_hub, *args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        hub.push_from_checkpoint(self, super()._push_from_checkpoint, checkpoint_folder)

    def _rotational_optim(self) -> str | None:
        optim = optim_name(self.args)
        if optim in OPTIMIZERS:
            return optim
        # Others' arguments (SFTConfig, ...) cannot name ours, and their default is nobody's choice.
        stock = TrainingArguments.__dataclass_fields__["optim"].default
        if not isinstance(self.args, RotationalTrainingArguments) and optim == getattr(stock, "value", stock):
            return "rotational_adamw"
        return None


class RotationalSeq2SeqTrainer(RotationalTrainerMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` with a rotational optimizer.

    Takes ``Seq2SeqTrainingArguments``; rotational settings go into their ``optim_args``, as for a script.
    """


class RotationalTrainer(RotationalTrainerMixin, Trainer):
    """``transformers.Trainer`` with a rotational optimizer.

    Example::

        args = RotationalTrainingArguments(output_dir="out", learning_rate=5e-5)
        RotationalTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train()
    """
