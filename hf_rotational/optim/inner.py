"""Inner updates: what an optimizer does with a gradient before anybody thinks of spheres.

An inner keeps its moments in the parameter's state and returns a *direction*: its update without learning rate and
without weight decay, so that the plain optimizer is ``p -= lr (direction + weight_decay p)``.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_rotational import equilibrium

Group = dict[str, Any]
State = dict[str, Any]


class Inner(Protocol):
    """One optimizer's direction and its closed forms. Stateless: everything is in ``state`` and ``group``."""

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the state tensors shaped like the parameter; they start at zero."""
        ...

    def check(self, group: Group) -> None:
        """Raises ``ValueError`` for a hyperparameter of the group that makes no sense, naming it and its value."""

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        """Updates the moments in ``state`` and returns a new tensor: the step to subtract, per unit of learning rate.

        Args:
            grad: the gradient, in the dtype of the state. ``state["step"]`` already counts this step.
        """

    def rotation(self, group: Group, lr: float) -> float:
        """Equilibrium angle at this learning rate, radians per step."""

    def match_constant(self, group: Group) -> float:
        """``c`` such that free-running updates turn a neuron by ``c lr / rms(weight)`` radians per step."""


class AdamW:
    """Adam's direction: the mean gradient over the root of the mean squared gradient, both bias corrected."""

    buffers = ("exp_avg", "exp_avg_sq")

    def check(self, group: Group) -> None:
        check_betas(group["betas"])
        check_non_negative("eps", group["eps"])

    def direction(self, grad: Tensor, state: State, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        step = state["step"].item()
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        return torch.div(state["exp_avg"], denominator, out=denominator).div_(1 - beta1**step)

    def rotation(self, group: Group, lr: float) -> float:
        rotation = equilibrium.adamw(lr=lr, weight_decay=group["weight_decay"], betas=group["betas"]).rotation
        assert rotation is not None
        return rotation

    def match_constant(self, group: Group) -> float:
        # Independent gradients would give sqrt((1-b1)/(1+b1)); fine-tuning runs settle at twice that.
        beta1 = group["betas"][0]
        return 2 * math.sqrt((1 - beta1) / (1 + beta1))


def check_non_negative(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a number >= 0 (NaN and infinity are not)."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"Invalid {name}: {value} (must be a finite number >= 0)")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless ``betas`` are two numbers in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas} (two numbers are needed)")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid betas[{index}]: {beta} (must be in [0, 1))")
