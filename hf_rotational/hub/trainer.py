"""What a Trainer does with the Hub instead of its own: functions as in :mod:`hf_rotational.training.behavior`.

The Trainer uploads its whole output directory as it is: with the token and the paths in ``training_args.bin``, and with
whatever links lead to. Here it uploads what :mod:`hf_rotational.hub.files` picks, with a card that says how the model
was trained.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from hf_rotational.errors import UserError
from hf_rotational.hub.facts import Known
from hf_rotational.hub.files import checkpoint_files, model_files
from hf_rotational.hub.push import Target
from hf_rotational.hub.readme import is_own, write_card
from hf_rotational.monitor.callback import measured, unwrapped
from hf_rotational.monitor.header import dataset_ids, run_header
from hf_rotational.optim.optimizer import RotationalOptimizer

logger = logging.get_logger(f"transformers.{__name__}")


def init_hf_repo(trainer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Says what to do if there is no repository to be had."""
    token = kwargs.get("token") or (args[0] if args else None) or trainer.args.hub_token
    with _target(trainer, token=token).explained():
        original(*args, **kwargs)


def push_to_hub(
    trainer: Any,
    original: Callable[..., Any],
    commit_message: str | None = "End of training",
    blocking: bool = True,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    **kwargs: Any,
) -> CommitInfo | Future[CommitInfo] | None:
    """Saves the model, writes its card and uploads both. What else it takes is ``create_model_card``'s.

    Raises:
        UserError: if the Hub does not take it, after the model was saved; says why, and how to push it again.
    """
    args, run_dir = trainer.args, _output_dir(trainer)
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    trainer.save_state()  # so that the command can push it as well
    if trainer.hub_model_id is None:
        if private is not None:
            args.hub_private_repo = private  # not every version of the method takes it
        trainer.init_hf_repo(token=token)
    if not trainer.is_world_process_zero():
        return None
    tags = kwargs.pop("tags", None) or []
    tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(trainer.model, "model_tags", None) or ())]
    if tags:
        kwargs["tags"] = list(dict.fromkeys(tags))
    complete_cards(trainer)
    trainer.create_model_card(**{"model_name": trainer.hub_model_id.rpartition("/")[2], **kwargs})
    trainer._finish_current_push()
    target = _target(trainer, token=token, revision=revision, private=private)
    with target.explained():
        files = model_files(run_dir, run_dir)
    send = target.upload if blocking else target.upload_in_background
    return send(files, run_dir, commit_message or "End of training")


def push_from_checkpoint(trainer: Any, original: Callable[..., None], checkpoint_folder: str) -> None:
    """Uploads a checkpoint in the background, by ``args.hub_strategy``. Training goes on if that fails."""
    args, run_dir, saved = trainer.args, _output_dir(trainer), Path(checkpoint_folder)
    strategy = HubStrategy(args.hub_strategy)
    if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
        return
    running = trainer.push_in_progress
    if running is not None and not running.is_done() and not args.hub_always_push:
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    by_steps = args.save_strategy == SaveStrategy.STEPS
    progress = f"step {trainer.state.global_step}" if by_steps else f"epoch {int(trainer.state.epoch or 0)}"
    target = _target(trainer, folder=saved)
    try:
        with target.explained():
            write_card(run_dir, target.repo_id, saved=saved, known=_known(trainer))
            files = model_files(saved, run_dir)
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else saved.name
                files |= {f"{name}/{path}": file for path, file in checkpoint_files(saved, run_dir).items()}
        job = target.upload_in_background(files, run_dir, f"Training in progress, {progress}")
    except UserError as error:
        logger.warning(str(error))
        return
    jobs = [] if running is None or running.is_done() else running.jobs
    trainer.push_in_progress = PushInProgress([*jobs, job])  # type: ignore[arg-type]


def create_model_card(trainer: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Completes the card that the Trainer writes, or the metadata of one that is the user's, which it then leaves."""
    if not trainer.is_world_process_zero():
        return
    run_dir = _output_dir(trainer)
    try:
        own = is_own(run_dir)
        if not own:
            if not args and "dataset_tags" in inspect.signature(original).parameters:
                # Left to itself, the Trainer names what read the files: "generator", "imagefolder", None.
                kwargs.setdefault("dataset_tags", list(dataset_ids(trainer.train_dataset)))
            original(*args, **kwargs)
        write_card(run_dir, _target(trainer).repo_id, known=_known(trainer), drafted=not own)
    except UserError as error:  # in the middle of training, for some Trainers
        logger.warning(str(error))


def complete_cards(trainer: Any) -> None:
    """Has :func:`create_model_card` called, whatever class writes the trainer's card."""
    vars(trainer)["create_model_card"] = _CardWriter(trainer)


class _CardWriter:
    """``create_model_card`` of one trainer.

    Holds it weakly: in a cycle, a trainer that is deleted would keep its model in memory until garbage is collected.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = weakref.ref(trainer)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self.trainer()
        create_model_card(trainer, partial(type(trainer).create_model_card, trainer), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.trainer(),)  # Ray pickles trainers


def _known(trainer: Any) -> Known:
    model, optimizer = trainer.model, unwrapped(trainer.optimizer)
    header, angle = None, None
    if optimizer is not None:
        watched = measured(model, optimizer)
        header = run_header(trainer.args, trainer.state, model, optimizer, watched, 0, trainer.train_dataset)
    if isinstance(optimizer, RotationalOptimizer):
        peaks = [optimizer.target_rotation({**group, "lr": group["peak_lr"]}) for _, group in optimizer.rotating()]
        angle = max(peaks, default=None)
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return Known(trainer.state.log_history, header, angle, type(model).__name__, best)


def _output_dir(trainer: Any) -> Path:
    return Path(trainer.args.output_dir or ".")


def _target(
    trainer: Any,
    folder: Path | None = None,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
) -> Target:
    args, run_dir = trainer.args, _output_dir(trainer)
    return Target(
        folder or run_dir,
        trainer.hub_model_id or args.hub_model_id or run_dir.absolute().name,
        token or args.hub_token,
        bool(args.hub_private_repo if private is None else private),
        revision or args.hub_revision,
    )
