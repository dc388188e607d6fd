"""What a Trainer does beside its own: functions of the trainer, of its own method, and of that method's arguments.

:class:`~hf_rotational.RotationalTrainerMixin` calls them in its methods of the same names; ``trainer_patches`` puts
them into ``transformers.Trainer`` itself, for runs that ask for it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_rotational.hub import trainer as hub
from hf_rotational.monitor.callback import RotationMonitor
from hf_rotational.monitor.records import FILE_NAME as RECORDS
from hf_rotational.optim.factory import OPTIMIZERS, optim_name
from hf_rotational.standardize import is_standardized, raw_state_dicts, standardize
from hf_rotational.training.arguments import NO_STANDARDIZATION
from hf_rotational.training.checkpoint import (
    check_raw_weights,
    check_resumable,
    last_complete_checkpoint,
    load_raw_weights,
    load_weights,
    save_raw_weights,
    weight_files,
)
from hf_rotational.training.distributed import check_deepspeed

logger = logging.get_logger(f"transformers.{__name__}")


def asked_for(args: TrainingArguments) -> bool:
    """Whether training arguments name a rotational optimizer or weight standardization."""
    return optim_name(args) in OPTIMIZERS or standardization(args) != NO_STANDARDIZATION


def standardization(args: TrainingArguments) -> str:
    """Value of ``weight_standardization``, which stock arguments do not have."""
    return getattr(args, "weight_standardization", NO_STANDARDIZATION)


def init(trainer: Trainer, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Attaches the monitors among the callbacks, or one of its own by ``args.rotation_logging_steps``."""
    vars(trainer)["_made_at"] = time.time()
    original(*args, **kwargs)
    every = getattr(trainer.args, "rotation_logging_steps", 0)
    for monitor in monitors(trainer) or ([RotationMonitor(every)] if every else []):
        monitor.attach(trainer)


def monitors(trainer: Trainer) -> list[RotationMonitor]:
    """Those among the trainer's callbacks."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, RotationMonitor)]


def with_losses(trainer: Trainer, model: nn.Module) -> nn.Module:
    """What the optimizer is to train: the model and, in sentence-transformers, losses with parameters of their own,
    whose names begin with ``loss_``."""
    loss = getattr(trainer, "loss", None)
    losses = [each for each in (loss.values() if isinstance(loss, dict) else [loss]) if isinstance(each, nn.Module)]
    if not any({*each.parameters()} - {*model.parameters()} for each in losses):
        return model
    return nn.ModuleDict({"model": model, **{f"loss_{place}": each for place, each in enumerate(losses)}})


def loads_as_trainer(of_class: Any) -> bool:
    """Whether a class, as ``super()`` sees it, loads checkpoints as ``transformers.Trainer`` does."""
    return all(
        getattr(of_class, name).__func__ is getattr(Trainer, name)
        for name in ("_load_from_checkpoint", "_load_best_model")
    )


def train(
    trainer: Trainer,
    original: Callable[..., Any],
    resume_from_checkpoint: str | bool | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Where the latest checkpoint is to be resumed from, takes the latest that is complete."""
    if resume_from_checkpoint is True and not is_sharded(trainer):
        resume_from_checkpoint = _latest(trainer)
    return original(resume_from_checkpoint, *args, **kwargs)


def _latest(trainer: Trainer) -> str:
    """The latest complete checkpoint: what the first process finds, since all have to resume from one."""
    found: list[str | ValueError | None] = [None]
    if trainer.is_world_process_zero():
        try:
            found = [str(last_complete_checkpoint(Path(trainer.args.output_dir or ".")))]
        except ValueError as error:
            found = [error]
    if trainer.args.world_size > 1:
        broadcast_object_list(found)
    if isinstance(found[0], ValueError):
        raise found[0]
    return str(found[0])


def inner_training_loop(trainer: Trainer, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Standardizes the model before the optimizer exists; from now on, model cards say how it was trained."""
    check_deepspeed(trainer)
    standardize_model(trainer)
    hub.complete_cards(trainer)
    if not kwargs.get("resume_from_checkpoint") and trainer.is_world_process_zero():
        _set_aside(trainer)
    return original(*args, **kwargs)


def _set_aside(trainer: Trainer) -> None:
    """Renames what an earlier run has left to be read: reports and model cards would take it for this run's."""
    folder = Path(trainer.args.output_dir or ".")
    for path in [folder / RECORDS, folder / TRAINER_STATE_NAME, *folder.glob("*_results.json")]:
        # What is newer is this run's, of an evaluation before training.
        if path.is_file() and path.stat().st_mtime < vars(trainer).get("_made_at", math.inf):
            os.replace(path, path.with_name(f"{path.name}.old"))


def run_epoch(trainer: Trainer, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Takes no step more where the checkpoint of a run's last step is resumed from; the Trainer would take one."""
    if trainer.state.global_step >= trainer.state.max_steps:
        trainer.control.should_training_stop = True
    else:
        original(*args, **kwargs)


def save_model(
    trainer: Trainer,
    original: Callable[..., None],
    output_dir: str | None = None,
    _internal_call: bool = False,
) -> None:
    """Adds to checkpoints what resuming a standardized model needs. Weights are saved plain by the model itself."""
    # That is how checkpoints are saved; nobody resumes from what users save.
    checkpoint = Path(output_dir) if _internal_call and output_dir is not None else None
    if checkpoint is not None and trainer.args.should_save:
        # Written last, it says that a checkpoint is complete: what an earlier run left must not say so of this one.
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    original(output_dir, _internal_call)
    if checkpoint is not None:
        save_raw_weights(cast(nn.Module, trainer.model), checkpoint, trainer.args.should_save)


def save_optimizer_and_scheduler(trainer: Trainer, original: Callable[[str], None], output_dir: str) -> None:
    """Saves with them what FSDP resumes a model from, beside the plain weights of the checkpoint."""
    with _fsdp_names(trainer):
        original(output_dir)


def load_from_checkpoint(
    trainer: Trainer,
    original: Callable[..., None],
    resume_from_checkpoint: str,
    model: nn.Module | None = None,
) -> None:
    """Loads exactly what was saved, or refuses. Sharded models, adapters and other formats are left to the Trainer."""
    standardize_model(trainer)
    folder = Path(resume_from_checkpoint)
    if not is_sharded(trainer):
        check_resumable(folder)
    _load(trainer, folder, lambda: original(resume_from_checkpoint, model))


def load_best_model(trainer: Trainer, original: Callable[[], None]) -> None:
    """The same for the best model at the end of training."""
    best = trainer.state.best_model_checkpoint
    if best is not None and Path(best).is_dir():
        _load(trainer, Path(best), original)
    else:
        original()  # which says what to do about one that is on another machine


def _load(trainer: Trainer, folder: Path, original: Callable[[], None]) -> None:
    model = cast(nn.Module, trainer.model)
    if is_sharded(trainer) or not weight_files(folder):
        check_raw_weights(model, folder)
        with _fsdp_names(trainer):
            original()
        load_raw_weights(model, folder)
    else:
        logger.info(f"Loading model from {folder}.")
        load_weights(model, folder)


def _fsdp_names(trainer: Trainer) -> AbstractContextManager[None]:
    """Where FSDP's own files have the names it looks for: whole state dicts are loaded by those of the parameters."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    full = plugin is not None and getattr(plugin.state_dict_type, "name", "") == "FULL_STATE_DICT"
    return raw_state_dicts() if full else nullcontext()


METHODS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "__init__": init,
        "train": train,
        "_inner_training_loop": inner_training_loop,
        "_run_epoch": run_epoch,
        "save_model": save_model,
        "_save_optimizer_and_scheduler": save_optimizer_and_scheduler,
        "_load_from_checkpoint": load_from_checkpoint,
        "_load_best_model": load_best_model,
        "init_hf_repo": hub.init_hf_repo,
        "push_to_hub": hub.push_to_hub,
        "_push_from_checkpoint": hub.push_from_checkpoint,
    }
)
"""Name of the Trainer's method to what is done instead."""


def standardize_model(trainer: Trainer) -> None:
    """Standardizes the model by ``args.weight_standardization``, unless it is.

    Raises:
        ValueError: if there is an optimizer already, which has the plain weights, or with DeepSpeed or FSDP1, which
            take parameters apart.
    """
    mode, model = standardization(trainer.args), cast(nn.Module, trainer.model)
    if mode == NO_STANDARDIZATION or is_standardized(model):
        return
    version = trainer.accelerator.state.fsdp_plugin.fsdp_version if trainer.is_fsdp_enabled else None
    if trainer.is_deepspeed_enabled or version == 1:
        raise ValueError(f"Invalid weight_standardization: {mode!r} with DeepSpeed or FSDP1 (use FSDP2 or DDP)")
    if trainer.optimizer is not None:
        raise ValueError(
            f"Invalid weight_standardization: {mode!r} with an optimizer that was passed in, which holds the weights "
            "as they were (name it in optim or optimizer_cls_and_kwargs, or standardize the model first)"
        )
    standardize(model, mode)


def is_sharded(trainer: Trainer) -> bool:
    """Whether the Trainer saves and loads the model in a way of its own."""
    return trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_sagemaker_mp_enabled()
