"""Learned gains and means: what rotation holds fixed of a neuron, trained beside it.

A neuron's weight is ``w = gain * d + mean * 1`` with a unit direction ``d`` (no last term unless the mean is learned).
These coordinates are orthogonal, so the gradient ``G`` of the plain weight gives each its own:

    gain: <G, d>        mean: <G, 1>        d: gain * G

Gain and mean take the inner update, as a module's own parameters would, with their own moments in the optimizer's
state; the direction rotates. So a plain weight trains exactly as a parametrized one, with nothing to fold afterwards.

State, per neuron: ``gain`` (signed), ``mean``, and for each the inner's moments under its name, such as
``gain_exp_avg``. The norm that the weight has is ``norm``: ``|gain|``, but no less than what its dtype can hold, so
that a gain may come to 0, or pass through it and turn the neuron over, without its direction getting lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_rotational.optim.inner import Group, Inner, State


class Coordinates:
    """The learned gains and means of some rotating tensors, apart from their directions for the length of one step.

    Args:
        weights: in the dtype to compute in; a learned mean is taken out of them, in place.
        grads: of the weights.
        states: one dict a tensor, which has its norm; gains and means are made here.
        group: the hyperparameters.
        dims: the dims one neuron spans.
    """

    def __init__(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: Group, dims: tuple[int, ...]
    ) -> None:
        self.states = states
        # The group's own weight decay sets the angle of what rotates.
        self.group = {**group, "weight_decay": group["gain_weight_decay"]}
        self.grads: dict[str, list[Tensor]] = {}
        gains = group["gains"] == "learned"
        for weight, state in zip(weights, states, strict=True):
            if gains and "gain" not in state:
                state["gain"] = state["norm"].clone()
            if learns_mean(group):
                if "mean" not in state:
                    state["mean"] = weight.mean(dims, keepdim=True)
                weight.sub_(state["mean"])
        self.scales = [_scale(state) for state in states]
        if gains:
            self.grads["gain"] = [
                torch.where(state["norm"] == 0, 0.0, (grad * weight).sum(dims, keepdim=True) / scale)
                for grad, weight, scale, state in zip(grads, weights, self.scales, states, strict=True)
            ]
        if learns_mean(group):
            self.grads["mean"] = [grad.sum(dims, keepdim=True) for grad in grads]

    def learn_(self, inner: Inner) -> None:
        """Takes the inner step of every gain and mean, in place. With ``lr == 0`` only their moments learn."""
        group = {**self.group, "lr": float(self.group["lr"]) * self.group["gain_lr_multiplier"]}
        for name, grads in self.grads.items():
            values = [state[name] for state in self.states]
            moments = [_moments(state, name, inner, group) for state in self.states]
            inner.descend_(values, inner.directions(grads, values, moments, group, rotates=False), group)

    def put_together_(self, weights: list[Tensor], dtype: torch.dtype, dims: tuple[int, ...]) -> None:
        """Gives rotated weights, in place, the norms and means that have been learned.

        Args:
            weights: as they came, but turned.
            dtype: the parameters' own.
            dims: the dims one neuron spans.
        """
        for weight, state, scale in zip(weights, self.states, self.scales, strict=True):
            if "gain" in self.grads:
                norm = state["gain"].abs().clamp(min=smallest_norm(weight, dtype, dims))
                state["norm"] = torch.where(state["norm"] == 0, 0.0, norm)
                weight.mul_(_scale(state) / scale)
            if "mean" in self.grads:
                weight.add_(state["mean"])


def learns_mean(group: Group) -> bool:
    """Whether a group's neurons learn their means."""
    return bool(group["centering"] == "learned")


def learns(group: Group) -> bool:
    """Whether a group's neurons learn anything besides their direction."""
    return bool(group["gains"] == "learned" or learns_mean(group))


def smallest_norm(weight: Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> float:
    """The smallest norm of a neuron that leaves its direction intact.

    Its entries must be normal numbers in ``dtype``, and their squares in the weight's own, which is computed in.
    """
    fan_in = math.prod(weight.shape[dim] for dim in dims)
    return math.sqrt(fan_in) * max(torch.finfo(dtype).tiny, math.sqrt(torch.finfo(weight.dtype).tiny))


def rotating_part(weight: Tensor, state: State) -> Tensor:
    """What turns by the target angle: the weight less its learned mean, on the side of its unit direction."""
    if "mean" in state:  # made by a rotational optimizer that learns it
        weight = weight - state["mean"]
    return weight * sign(state["gain"]) if "gain" in state else weight


def sign(tensor: Tensor) -> Tensor:
    """1 or -1, for zeros too."""
    return torch.ones_like(tensor).copysign(tensor)


def _scale(state: State) -> Tensor:
    """What multiplies the unit directions in a weight; 1 for neurons that have none and take the plain update."""
    scale = torch.where(state["norm"] == 0, 1.0, state["norm"])
    return scale.copysign(state["gain"]) if "gain" in state else scale


def _moments(state: State, name: str, inner: Inner, group: Group) -> State:
    """The inner's state of one coordinate, whose tensors it updates in place."""
    start = {"step": torch.tensor(0.0), **dict.fromkeys(inner.buffers(group))}
    return {
        key: state.setdefault(f"{name}_{key}", torch.zeros_like(state[name]) if value is None else value)
        for key, value in start.items()
    }
