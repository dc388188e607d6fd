"""From a model and training arguments to an optimizer: what Trainer, factory argument and script flag share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from hf_rotational.neurons import plan, rotating_share
from hf_rotational.optim.config import (
    ANGLE_WEIGHT_DECAYS,
    RotationalConfig,
    check_keys,
    parse_optim_args,
    parse_rotation,
    parse_settings,
)
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.optimizers import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD
from hf_rotational.optim.sharding import check_whole

if TYPE_CHECKING:
    from transformers import TrainingArguments

# A child of transformers' logger, so that its verbosity and --log_level govern ours.
logger = logging.get_logger(f"transformers.{__name__}")

OPTIMIZERS: Mapping[str, Callable[..., RotationalOptimizer]] = MappingProxyType(
    {
        "rotational_adamw": RotationalAdamW,
        "rotational_sgd": RotationalSGD,
        "rotational_lion": RotationalLion,
        "rotational_adam": RotationalAdam,
    }
)
"""Value of ``optim`` to optimizer class."""

SMALL_ANGLE = 1e-3
"""Radians per step that fine-tuning takes about half or more of (docs/evidence.md)."""


class RotationalOptimizerFactory:
    """Builds a rotational optimizer for a model; the Trainer takes it in ``optimizer_cls_and_kwargs``.

    Example::

        Trainer(..., optimizer_cls_and_kwargs=(RotationalOptimizerFactory, {"optim": "rotational_adamw", "lr": 5e-5}))

    The Trainer constructs it without arguments and calls it with the model, which is why all settings are in the call.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        optim: str = "rotational_adamw",
        weight_decay: float = 0.0,
        decays: Callable[[str], bool] | None = None,
        **settings: Any,
    ) -> RotationalOptimizer:
        """Plans the model, groups its parameters and builds the optimizer.

        Args:
            model: the model to train.
            lr: peak learning rate.
            optim: a key of :data:`OPTIMIZERS`.
            weight_decay: of parameters that do not rotate, and what sets the equilibrium angle of those that do, unless
                it is 0 (the Trainer's default) or ``angle_weight_decay`` is given.
            decays: which parameters that do not rotate decay, by name; by default as the Trainer decides it (no
                biases, no norms).
            **settings: fields of :class:`RotationalConfig` and hyperparameters of the optimizer (``momentum``).

        Raises:
            ValueError: for an unknown optimizer or setting, a value out of range, or a model whose parameters were
                flattened or cut up.
        """
        cls = optimizer_class(optim)
        own = hyperparameters(cls)
        check_keys("setting", settings, (*RotationalConfig.names(), *own))
        config = RotationalConfig(**{k: v for k, v in settings.items() if k not in own})
        angle_weight_decay = weight_decay
        if config.rotation == "equilibrium":
            angle_weight_decay = _angle_weight_decay(config, optim, weight_decay)
        check_whole(model.parameters())  # whatever else the plan would make of them
        rotation_plan = plan(model, **config.plan_options())
        trained = [entry for entry in rotation_plan if entry.parameter.requires_grad]
        if not rotation_plan.rotating:
            raise ValueError(f"No parameter of {type(model).__name__} rotates:\n{rotation_plan}")
        options = config.optimizer_options()
        if config.rounding == "auto":
            options["rounding"] = _rounding_for(model)
        optimizer = cls(
            rotation_plan.parameter_groups(
                weight_decay=weight_decay,
                decays=decays or decays_as_trainer(model),
                rotating={"weight_decay": angle_weight_decay},
            ),
            lr=lr,
            **{k: v for k, v in settings.items() if k in own},
            **options,
        )
        angles = {optimizer.target_rotation(group) for group in optimizer.param_groups if group["rotational"]}
        logger.info(
            f"{type(optimizer).__name__}: of those that train, "
            f"{rotating_share([e.parameter for e in trained if e.rotates], [e.parameter for e in trained])}; "
            + (
                f"target angle at lr={lr:g}: {', '.join(f'{angle:.3g}' for angle in sorted(angles))} rad/step."
                if angles
                else "every step is the plain optimizer's."
            )
        )
        _warn_of_lost_steps(optimizer)
        if config.rotation == "equilibrium" and angles:
            _warn_of_small_angle(angle_weight_decay, ANGLE_WEIGHT_DECAYS[optim], max(angles))
        return optimizer


def _angle_weight_decay(config: RotationalConfig, optim: str, weight_decay: float) -> float:
    """The weight decay that sets the angle; says so where it is not one that the user has set."""
    usual = config.angle_weight_decay_of(optim)
    if config.angle_weight_decay is not None:
        return usual
    if weight_decay == 0:
        logger.info(
            f"weight_decay is 0, at which the equilibrium angle would be 0: the angle uses weight decay "
            f"{usual} (angle_weight_decay); parameters that do not rotate are not decayed."
        )
        return usual
    return weight_decay


def _warn_of_small_angle(weight_decay: float, usual: float, angle: float) -> None:
    """Says so if a weight decay that was chosen for AdamW makes the angle smaller than fine-tuning takes."""
    if weight_decay < usual / 4 and angle < SMALL_ANGLE:
        logger.warning(
            f"weight_decay={weight_decay:g} makes the target angle {angle:.2g} rad per step, "
            f"{math.sqrt(weight_decay / usual):.2g} times that of {usual:g}: little for fine-tuning. Set "
            f"weight_decay=0 (the angle then uses {usual:g}), or for the angle alone "
            f"rotation_angle_weight_decay={usual:g}."
        )


def _rounding_for(model: nn.Module) -> str:
    """Keeps what rounding cuts off where weights that train have 16 bits, too few for the steps of fine-tuning."""
    narrow = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype.itemsize == 2})
    if not narrow:
        return "nearest"
    logger.info(
        f"The model's weights are {' and '.join(narrow)}: rounding='kahan' keeps what rounding cuts off a step, for "
        "2 bytes an entry. Load the model with dtype=torch.float32 to train 32-bit weights."
    )
    return "kahan"


def _warn_of_lost_steps(optimizer: RotationalOptimizer) -> None:
    """Says so if rounding to nearest would swallow steps: a checkpoint in 16 bits is loaded in 16 bits by default."""
    lost = {
        str(parameter.dtype).removeprefix("torch."): optimizer.target_rotation(group)
        for parameter, group in optimizer.rotating()
        if parameter.dtype.itemsize < 4
        and group["rounding"] == "nearest"
        # An entry moves if its step is half the distance to its neighbour; a step is about angle times entry.
        and optimizer.target_rotation(group) < torch.finfo(parameter.dtype).eps / 2
    }
    for dtype, angle in lost.items():
        logger.warning(
            f"{dtype} weights cannot hold steps of {angle:.2g} rad: rounded to nearest, most entries would not move. "
            "Load the model with dtype=torch.float32 (and train with bf16=True), or set rounding='kahan' "
            "(--rotation_rounding kahan, or --optim_args rounding=kahan)."
        )


def optim_name(args: TrainingArguments) -> str:
    """The value of ``args.optim``, which the Trainer makes a member of an enum."""
    return str(getattr(args.optim, "value", args.optim))


def factory_kwargs(args: TrainingArguments, optim: str | None = None) -> dict[str, Any]:
    """The factory's keyword arguments, read from training arguments; ``optim`` is by default theirs.

    Raises:
        ValueError: for an ``optim_args`` key that is neither a rotational setting nor a hyperparameter of ``optim``.
    """
    optim = optim or optim_name(args)
    stated = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    taken = hyperparameters(optimizer_class(optim))
    return {
        "optim": optim,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        **{name: value for name, value in stated.items() if name in taken},
        **factory_settings(args, optim),
    }


def factory_settings(args: TrainingArguments, optim: str) -> dict[str, Any]:
    """The rotational settings, and the hyperparameters of ``optim``, among training arguments.

    They come from the ``rotation*`` fields of :class:`~hf_rotational.RotationalTrainingArguments`, where ``args`` has
    them, and from ``optim_args`` (``"rotation=match,centering=updates"``; ``"momentum=0.9"`` for SGD), which wins.

    Raises:
        ValueError: for an ``optim_args`` key that is not among them.
    """
    settings = vars(RotationalConfig())
    fields = {name: getattr(args, argument_name(name), None) for name in settings}
    if fields["rotation"] is not None:
        fields["rotation"] = parse_rotation(fields["rotation"])  # a hyperparameter search makes a string of a number
    extra = hyperparameters(optimizer_class(optim))
    # Betas hold a comma, which separates optim_args; they have arguments of their own.
    readable = {name: default for name, default in extra.items() if not isinstance(default, tuple)}
    given = parse_settings(parse_optim_args(args.optim_args), {**settings, **readable})
    return {name: value for name, value in fields.items() if value is not None} | given


def argument_name(setting: str) -> str:
    """The training argument that carries a setting: ``centering`` is ``rotation_centering``."""
    return setting if setting == "rotation" else f"rotation_{setting.removeprefix('rotational_')}"


def decays_as_trainer(model: nn.Module) -> Callable[[str], bool]:
    """The Trainer's own rule of which parameters decay, by name."""
    from transformers import Trainer  # slow to import, and only needed where a Trainer is in use anyway

    names = frozenset(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    return names.__contains__


def optimizer_class(optim: str) -> Callable[..., RotationalOptimizer]:
    """The optimizer an ``optim`` value names; ``ValueError`` with the valid ones if there is none."""
    if optim not in OPTIMIZERS:
        raise ValueError(f"Unknown optim: {optim!r} (valid: {', '.join(OPTIMIZERS)})")
    return OPTIMIZERS[optim]


def hyperparameters(cls: Callable[..., RotationalOptimizer]) -> dict[str, Any]:
    """An optimizer's own hyperparameters beside learning rate and weight decay, such as ``betas``: their defaults."""
    shared = {"params", "lr", "weight_decay"}
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in shared}
