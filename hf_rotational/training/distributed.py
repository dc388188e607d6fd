"""What of Accelerate's ways to spread training is refused before it begins.

Parameters that were taken apart are refused wherever a rotational optimizer meets them
(:mod:`hf_rotational.optim.sharding`). Here is what a Trainer knows sooner, and what no such optimizer ever sees.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hf_rotational.errors import UserError
from hf_rotational.optim.factory import OPTIMIZERS, RotationalOptimizerFactory, optim_name
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.sharding import REMEDY


def check_deepspeed(trainer: Trainer) -> None:
    """Checks that DeepSpeed, if it is in use, would train with the rotational optimizer asked for, on whole neurons.

    Raises:
        UserError: for a DeepSpeed config with an optimizer of its own, a ZeRO stage above 0 or tensor parallelism, and
            for an optimizer that was passed in, which the Trainer would not use.
    """
    if not trainer.is_deepspeed_enabled or not _rotational(trainer):
        return
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    if "optimizer" in config:
        raise UserError(
            f"Invalid DeepSpeed config: its optimizer ({config['optimizer'].get('type')}) would train in the place of "
            'the rotational one (remove its section "optimizer")'
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 0:
        raise UserError(
            f"Invalid DeepSpeed config: ZeRO stage {stage} (must be 0) cuts parameters into flat pieces, and neurons "
            f"cannot be told in them. {REMEDY}"
        )
    if config.get("tensor_parallel", {}).get("autotp_size", 1) > 1:
        raise UserError(
            "Invalid DeepSpeed config: tensor_parallel cuts neurons up in a way that parameters do not tell. "
            "Load the model with transformers' own tensor parallelism (DistributedConfig(tp_size=...))"
        )
    if isinstance(trainer.optimizer, RotationalOptimizer):
        raise UserError(
            f"Invalid optimizers: with DeepSpeed the Trainer does not use the {type(trainer.optimizer).__name__} that "
            "was passed in (name it in optim, or pass optimizer_cls_and_kwargs)"
        )


def _rotational(trainer: Trainer) -> bool:
    """Whether the Trainer has been asked to train with a rotational optimizer."""
    if trainer.optimizer_cls_and_kwargs is not None:
        cls: Any = trainer.optimizer_cls_and_kwargs[0]
        return isinstance(cls, type) and issubclass(cls, RotationalOptimizer | RotationalOptimizerFactory)
    # A RotationalTrainerMixin may use one where its arguments name none.
    named = getattr(trainer, "_rotational_optim", lambda: optim_name(trainer.args))()
    return named in OPTIMIZERS or isinstance(trainer.optimizer, RotationalOptimizer)
