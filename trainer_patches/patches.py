"""Puts the rotational optimizers and their settings into Transformers, and takes them out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from hf_rotational.compat import check_transformers
from trainer_patches.enums import add_member, remove_member

if TYPE_CHECKING:
    from transformers.trainer_optimizer import OptimizerContext

#: What :func:`revert` undoes; None while nothing is patched.
_applied: ExitStack | None = None


def apply() -> None:
    """Make ``rotational_adamw`` and its kin values of ``TrainingArguments.optim``, and their settings arguments.

    ``TrainingArguments`` and ``Trainer`` are changed in place, so that subclasses, and names that were imported before,
    know them too; a run that names neither a rotational ``optim`` nor ``weight_standardization`` is as it was. Call it
    before argument parsers are built: they read the arguments when they are constructed. A second call changes
    nothing. A process started with multiprocessing's "spawn" method begins unpatched and calls it for itself.
    """
    global _applied
    if _applied is not None:
        return
    check_transformers()

    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
    from transformers.training_args import OptimizerNames

    from hf_rotational.optim.factory import OPTIMIZERS
    from trainer_patches.arguments import add_fields
    from trainer_patches.trainer import patch_methods

    # Should one name fail, leaving the block takes out those before it; pop_all keeps them for revert().
    with ExitStack() as undo:
        for name in OPTIMIZERS:
            member = add_member(OptimizerNames, name.upper(), name)
            undo.callback(remove_member, OptimizerNames, member)
            if name in _OPTIMIZER_HANDLERS:
                raise ValueError(f"another package already handles optim={name!r}")
            # In place: the Trainer's module holds the same dict.
            _OPTIMIZER_HANDLERS[name] = _handle
            undo.callback(_OPTIMIZER_HANDLERS.pop, name)
        add_fields(undo)
        patch_methods(undo)
        _applied = undo.pop_all()


def revert() -> None:
    """Take out what :func:``apply`` put in. Does nothing when nothing is patched."""
    global _applied
    if _applied is not None:
        applied, _applied = _applied, None
        applied.close()


@contextmanager
def patched() -> Iterator[None]:
    """Apply the patches for the length of a block; what was patched before stays patched after it."""
    was_applied = _applied is not None
    apply()
    try:
        yield
    finally:
        if not was_applied:
            revert()


def _handle(context: OptimizerContext) -> tuple[type, dict[str, Any]]:
    """What the Trainer asks for: something it can call with the model, and the keyword arguments of that call."""
    from hf_rotational.optim.factory import RotationalOptimizerFactory, factory_kwargs

    return RotationalOptimizerFactory, factory_kwargs(context.args)
