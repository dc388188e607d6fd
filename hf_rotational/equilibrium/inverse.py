"""The closed forms the other way round: the weight decay or the learning rate that gives a wanted angle.

Example::

    inverse.weight_decay("adamw", rotation=3e-3, lr=1e-3, betas=(0.9, 0.95))  # 0.0855
    inverse.lr("sgdm", rotation=1e-2, weight_decay=1e-4, momentum=0.9)  # 0.95
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from hf_rotational.equilibrium import closed_forms

if TYPE_CHECKING:
    from hf_rotational.equilibrium.closed_forms import Value

    Hyperparameter: TypeAlias = Value | tuple[Value, Value]


class _Law(NamedTuple):
    """Every closed form's angle is proportional to a power of the weight decay and one of the learning rate."""

    form: Callable[..., closed_forms.Equilibrium[Any]]
    decay_power: float
    lr_power: float


LAWS = {
    "adamw": _Law(closed_forms.adamw, 1 / 2, 1 / 2),
    "adam_l2": _Law(closed_forms.adam_l2, 1 / 3, 2 / 3),
    "sgdm": _Law(closed_forms.sgdm, 1 / 2, 1 / 2),
    "lion": _Law(closed_forms.lion, 1 / 2, 1 / 2),
}


def weight_decay(optim: str, *, rotation: Value, lr: Value, **hyperparameters: Hyperparameter) -> Any:
    """The weight decay at which a neuron settles to turning by ``rotation`` radians per step.

    Args:
        optim: ``"adamw"``, ``"adam_l2"``, ``"sgdm"`` or ``"lion"``.
        rotation: the wanted angle.
        lr: learning rate.
        **hyperparameters: the other arguments of that optimizer's closed form, such as ``betas``. Adam with L2 needs
            ``fan_in`` and ``grad_l1``, on which its angle depends.

    Returns:
        A float, or an array if an argument is one.

    Raises:
        ValueError: for an unknown optimizer, an argument out of range, or a learning rate of 0.
    """
    law = _law(optim)
    at_one = _rotation(law, lr=lr, weight_decay=1.0, **hyperparameters)
    return _solve(rotation, at_one, 1 / law.decay_power, f"lr={lr}")


def lr(optim: str, *, rotation: Value, weight_decay: Value, **hyperparameters: Hyperparameter) -> Any:
    """The learning rate at which a neuron settles to turning by ``rotation`` radians per step.

    Args:
        optim: ``"adamw"``, ``"adam_l2"``, ``"sgdm"`` or ``"lion"``.
        rotation: the wanted angle.
        weight_decay: weight decay.
        **hyperparameters: as for :func:`weight_decay`.

    Returns:
        A float, or an array if an argument is one.

    Raises:
        ValueError: for an unknown optimizer, an argument out of range, or a weight decay of 0.
    """
    law = _law(optim)
    at_one = _rotation(law, lr=1.0, weight_decay=weight_decay, **hyperparameters)
    return _solve(rotation, at_one, 1 / law.lr_power, f"weight_decay={weight_decay}")


def _law(optim: str) -> _Law:
    if optim not in LAWS:
        raise ValueError(f"Unknown optim: {optim!r} (valid: {', '.join(LAWS)})")
    return LAWS[optim]


def _rotation(law: _Law, **arguments: Any) -> Any:
    rotation = law.form(**arguments).rotation
    if rotation is None:
        raise ValueError(f"the angle of {law.form.__name__} depends on the gradient: fan_in and grad_l1 are needed")
    return rotation


def _solve(rotation: Any, at_one: Any, power: float, given: str) -> Any:
    """Where an angle that is ``at_one`` at 1, and follows the inverse of ``power``, is ``rotation``."""
    (rotation,) = closed_forms.checked(rotation=rotation)
    for value in (at_one,) if isinstance(at_one, float) else at_one.flatten():
        if not 0 < value < math.inf:
            raise ValueError(f"no finite value gives an angle with {given}")
    return (rotation / at_one) ** power
