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
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rotational.optim.inner import Group, Inner, State, counter
from hf_rotational.optim.sharding import Sums, stacked


@dataclass(frozen=True)
class Coordinates:
    """The learned gains and means of a stack of rotating tensors, apart from their directions for one step."""

    grads: dict[str, Tensor]
    """Of each coordinate, by its name: what the step learns it from."""
    scale: Tensor
    """What multiplied the unit directions before the step."""

    def learn_(self, states: list[State], inner: Inner, group: Group) -> None:
        """Takes the inner step of every gain and mean, in place. With ``lr == 0`` only their moments learn."""
        own = {
            **group,
            "lr": float(group["lr"]) * group["gain_lr_multiplier"],
            "weight_decay": group["gain_weight_decay"],  # the group's own sets the angle of what rotates
        }
        for name, grads in self.grads.items():
            values = [state[name] for state in states]
            moments = [{key: state[f"{name}_{key}"] for key in _moments(inner, own)} for state in states]
            updates = [torch.empty_like(value) for value in values]
            inner.directions_into(updates, list(grads), values, moments, own, rotates=False)
            inner.descend_(values, updates, own)

    def put_together_(self, weight: Tensor, states: list[State], smallest: float) -> None:
        """Gives turned weights, in place, the norms and means that have been learned.

        Args:
            weight: the stack that was taken apart, its directions turned.
            states: of its tensors.
            smallest: norm that a neuron keeps although its gain is smaller.
        """
        if "gain" in self.grads:
            for state in states:
                norm = state["gain"].abs().clamp_(min=smallest)
                state["norm"].copy_(norm.masked_fill_(state["norm"] == 0, 0.0))
            weight.mul_(_scale(states) / self.scale)
        if "mean" in self.grads:
            weight.add_(stacked([state["mean"] for state in states]))


def count(states: list[State], inner: Inner, group: Group) -> None:
    """Counts one more step of what tensors learn, and makes what is missing of it."""
    for state in states:
        if group["gains"] == "learned" and "gain" not in state:
            state["gain"] = state["norm"].clone()
        for name in learned(group):
            for key in _moments(inner, group):
                if f"{name}_{key}" not in state:
                    state[f"{name}_{key}"] = counter() if key == "step" else torch.zeros_like(state[name])
    for name in learned(group):
        torch._foreach_add_([state[f"{name}_step"] for state in states], 1)


def take_apart_(
    weight: Tensor, grad: Tensor, states: list[State], group: Group, dims: tuple[int, ...]
) -> Sums[Coordinates]:
    """Finds the gradient of every coordinate, and takes learned means out of the weights, in place.

    Args:
        weight: a stack of weights of one shape, in the dtype to compute in.
        grad: of the weights.
        states: one dict a tensor, which has its norm, and what is learned.
        group: the hyperparameters.
        dims: the dims one neuron spans in the stack.
    """
    grads = {}
    if learns_mean(group):
        weight.sub_(stacked([state["mean"] for state in states]))
        grads["mean"] = yield grad.sum(dims, keepdim=True)
    scale = _scale(states)
    if group["gains"] == "learned":
        none = stacked([state["norm"] for state in states]) == 0
        grads["gain"] = ((yield (grad * weight).sum(dims, keepdim=True)) / scale).masked_fill(none, 0.0)
    return Coordinates(grads, scale)


def learns_mean(group: Group) -> bool:
    """Whether a group's neurons learn their means."""
    return bool(group["centering"] == "learned")


def learned(group: Group) -> list[str]:
    """Names of what a group's neurons learn besides their direction."""
    names = {"gain": group["gains"] == "learned", "mean": learns_mean(group)}
    return [name for name, is_learned in names.items() if is_learned]


def learns(group: Group) -> bool:
    """Whether a group's neurons learn anything besides their direction."""
    return bool(learned(group))


def smallest_norm(fan_in: int, stored: torch.dtype, computed: torch.dtype) -> float:
    """The smallest norm of a neuron that leaves its direction intact.

    Its entries must be normal numbers in the dtype they are stored in, their squares in the one computed in.
    """
    return math.sqrt(fan_in) * max(torch.finfo(stored).tiny, math.sqrt(torch.finfo(computed).tiny))


def rotating_part(weight: Tensor, state: State) -> Tensor:
    """What turns by the target angle: the weight less its learned mean, on the side of its unit direction."""
    if "mean" in state:  # made by a rotational optimizer that learns it
        weight = weight - state["mean"]
    return weight * sign(state["gain"]) if "gain" in state else weight


def sign(tensor: Tensor) -> Tensor:
    """1 or -1, for zeros too."""
    return torch.ones_like(tensor).copysign(tensor)


def _scale(states: list[State]) -> Tensor:
    """What multiplies the unit directions in weights; 1 for neurons that have none and take the plain update."""
    norm = stacked([state["norm"] for state in states])
    scale = norm.masked_fill(norm == 0, 1.0)
    return scale.copysign(stacked([state["gain"] for state in states])) if "gain" in states[0] else scale


def _moments(inner: Inner, group: Group) -> tuple[str, ...]:
    """Names of what the inner keeps of one coordinate."""
    return ("step", *inner.buffers(group))
