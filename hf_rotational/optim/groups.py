"""What a parameter group says about rotation, and whether it makes sense."""

from __future__ import annotations

import math
from typing import Any, TypedDict

from torch import Tensor

from hf_rotational.optim.inner import Group, check_non_negative
from hf_rotational.optim.precision import ROUNDINGS
from hf_rotational.optim.rotation import reduced_dims
from hf_rotational.optim.sharding import check_whole

ROTATIONS = ("equilibrium", "match")
CENTERINGS = ("none", "updates", "weights", "learned")
CHOICES = {
    "centering": CENTERINGS,
    "gains": ("fixed", "learned"),
    "granularity": ("neuron", "tensor"),
    "rounding": ROUNDINGS,
    "backend": ("auto", "fused", "eager", "foreach"),
}


class RotationalOptions(TypedDict, total=False):
    """Keyword arguments every rotational optimizer takes; each may also be set per parameter group."""

    rotation: str | float
    update_norm_decay: float
    rotational_eps: float
    centering: str
    granularity: str
    rounding: str
    transient_correction: bool
    gains: str
    gain_lr_multiplier: float
    gain_weight_decay: float


def check_group(group: Group) -> None:
    """Checks what every rotational optimizer's group has in common.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    for name in ("lr", "weight_decay", "rotational_eps", "gain_lr_multiplier", "gain_weight_decay"):
        check_non_negative(name, float(group[name]))
    if not 0.0 <= group["update_norm_decay"] < 1.0:
        raise ValueError(f"Invalid update_norm_decay: {group['update_norm_decay']} (must be in [0, 1))")
    for name, allowed in CHOICES.items():
        if group[name] not in allowed:
            raise ValueError(f"Invalid {name}: {group[name]!r} (must be one of {', '.join(allowed)})")
    if not 0.0 < group["rotation_scale"] < math.inf:
        raise ValueError(f"Invalid rotation_scale: {group['rotation_scale']} (must be a finite number > 0)")
    check_rotation(group["rotation"])
    if isinstance(group["rotation"], float | int) and group["peak_lr"] == 0:
        raise ValueError(
            f"rotation={group['rotation']} is an angle at the constructor's learning rate, which must not be 0: lr=0"
        )
    check_whole(group["params"])
    for parameter in group["params"]:
        _check_parameter(parameter, group)


def _check_parameter(parameter: Tensor, group: Group) -> None:
    shape, ndim, dims = tuple(parameter.shape), parameter.ndim, group["neuron_dims"]
    if not parameter.is_floating_point():
        raise ValueError(
            f"Invalid dtype: {parameter.dtype} of the parameter of shape {shape} (only real floating-point parameters "
            "have a rotation)"
        )
    if group["rotational"] and ndim >= 2:
        in_range = isinstance(dims, tuple | list) and all(-ndim <= dim < ndim for dim in dims)
        if not in_range or len({dim % ndim for dim in dims}) != len(dims):
            raise ValueError(
                f"Invalid neuron_dims: {dims} for the parameter of shape {shape} (must be some of its dims)"
            )
    if neuron_span(parameter, group) and group["rotation"] == "equilibrium" and group["weight_decay"] == 0:
        raise ValueError(
            f"weight_decay=0 with rotation='equilibrium' makes the target angle 0, so the parameter of shape {shape} "
            "would never move. Set weight_decay (it sets the angle: hf_rotational.equilibrium), or rotation='match', "
            "or rotation=<radians per step>, or put it in a group with rotational=False"
        )


def check_rotation(rotation: str | float) -> None:
    """Raises ``ValueError`` unless ``rotation`` is a known rule or a positive, finite number of radians per step."""
    is_angle = isinstance(rotation, float | int) and not isinstance(rotation, bool)
    if rotation not in ROTATIONS and not (is_angle and 0 < float(rotation) < math.inf):
        raise ValueError(
            f"Invalid rotation: {rotation!r} (must be one of {', '.join(ROTATIONS)}, "
            "or a number > 0: radians per step at the constructor's learning rate)"
        )


def neuron_span(parameter: Tensor, group: Group) -> tuple[int, ...]:
    """The dims one neuron of ``parameter`` spans; empty if the parameter does not rotate."""
    if not group["rotational"] or parameter.ndim < 2:
        return ()
    tensor_wide = group["granularity"] == "tensor"
    dims = reduced_dims(parameter.ndim, () if tensor_wide else group["neuron_dims"])
    fan_in = math.prod(parameter.shape[dim] for dim in dims)
    # One entry has no direction to turn; nor have two that sum to 0.
    return dims if fan_in >= (3 if holds_mean(group) else 2) else ()


def holds_mean(group: Group) -> bool:
    """Whether the rotating part of a group's neurons has no mean, rather than the mean it started with."""
    return group["centering"] in ("weights", "learned")


def settings(group: Group) -> dict[str, Any]:
    """A group without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}
