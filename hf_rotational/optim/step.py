"""The one step: an inner direction, then rotation for what rotates, the plain update for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rotational.optim.gains import learns, learns_mean, sign, smallest_norm, take_apart_
from hf_rotational.optim.groups import holds_mean
from hf_rotational.optim.inner import Group, Inner, State
from hf_rotational.optim.precision import compute_dtype, read, write
from hf_rotational.optim.rotation import center_, neuron_norm, rotate_
from hf_rotational.optim.sharding import Sums, alone, local, local_as, shard_number, stacked
from hf_rotational.optim.state import keep, state_here


@dataclass(frozen=True)
class Step:
    """One step of parameters that share a group, dtype, device and, if they rotate, a shape and a history."""

    inner: Inner
    group: Group
    dims: tuple[int, ...]
    """What one neuron spans; empty if the parameters do not rotate."""
    angle: float
    """That they turn by, in radians."""

    def take(self, parameters: list[Tensor], kept: list[State], places: list[int]) -> Sums[None]:
        """Takes the step, on the parts of the parameters that are on this rank.

        Args:
            parameters: with gradients.
            kept: their states.
            places: of each in its optimizer; they seed stochastic rounding, so that replicas round alike.
        """
        moves, rounding = float(self.group["lr"]) != 0, self.group["rounding"]
        stored = [local(parameter.detach()) for parameter in parameters]
        states = [state_here(state, parameter) for state, parameter in zip(kept, parameters, strict=True)]
        weights = [read(part, state, rounding) for part, state in zip(stored, states, strict=True)]
        grads = [self._grad(parameter).to(weights[0].dtype) for parameter in parameters]
        for state, weight in zip(states, weights, strict=True):
            self._prepare_moments(state, weight)
        if self.dims:
            # A single weight is stacked as a view, so what happens to the stack happens to it.
            stack, weight = self._stack(parameters, states), stacked(weights)
            yield from stack.prepare(weight)
            yield from stack.turn(weight if moves else weight.clone(), stacked(grads))
            if moves and len(weights) > 1:
                torch._foreach_copy_(weights, list(weight.unbind()))
        else:
            updates = self.inner.directions(grads, weights, states, self.group, rotates=False)
            self.inner.descend_(weights, updates, self.group)
        for parameter, part, weight, state, place in zip(parameters, stored, weights, states, places, strict=True):
            if moves:
                write(part, weight, state, rounding, place=(shard_number(parameter) << 16) + place)
        for parameter, state, whole in zip(parameters, states, kept, strict=True):
            keep(state, whole, parameter, self.dims)

    def prepare(self, parameter: Tensor, kept: State) -> None:
        """Makes the state of a float32 parameter whose neurons are whole on this rank, and centres its weights if they
        are to be: what :meth:`take` does before anything else."""
        part, state = local(parameter.detach()), state_here(kept, parameter)
        self._prepare_moments(state, part)
        if self.dims:
            alone(self._stack([parameter], [state]).prepare(part.unsqueeze(0)))
        keep(state, kept, parameter, self.dims)

    def _stack(self, parameters: list[Tensor], states: list[State]) -> _Stack:
        fan_in = math.prod(parameters[0].shape[dim] for dim in self.dims)
        smallest = smallest_norm(fan_in, parameters[0].dtype, compute_dtype(parameters[0]))
        return _Stack(self, states, tuple(dim + 1 for dim in self.dims), fan_in, smallest)

    def _grad(self, parameter: Tensor) -> Tensor:
        check_dense(parameter)
        assert parameter.grad is not None
        grad = local_as(parameter.grad, parameter)
        return -grad if self.group["maximize"] else grad

    def _prepare_moments(self, state: State, weight: Tensor) -> None:
        """Makes what is missing, so that moments another optimizer left are taken over as they are."""
        missing = [name for name in self.inner.buffers(self.group) if name not in state]
        if "step" not in state and self.inner.counts_steps:
            # Moments that are there already have seen a gradient.
            state["step"] = torch.tensor(0.0 if missing or not self.inner.buffers(self.group) else 1.0)
        for name in missing:
            state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)


@dataclass(frozen=True)
class _Stack:
    """Rotating weights of one shape, stacked along dim 0."""

    step: Step
    states: list[State]
    dims: tuple[int, ...]
    """What one neuron spans in the stack."""
    fan_in: int
    smallest: float
    """Norm that a neuron with a learned gain keeps."""

    def prepare(self, weight: Tensor) -> Sums[None]:
        """Measures, before the weights first move, what is held of their neurons; centres them when they do."""
        group = self.step.group
        if "norm" not in self.states[0]:
            start, mean = weight, None
            if holds_mean(group):
                start = weight.clone()
                mean = yield from center_(start, self.dims, self.fan_in)
            norm = (yield neuron_norm(start, self.dims).square()).sqrt()
            whole = (yield neuron_norm(weight, self.dims).square()).sqrt()
            precision = torch.finfo(weight.dtype)
            # As good as 0: a norm whose square underflows (its reciprocal would not be finite), and the rounding that
            # centring leaves of a constant neuron.
            none = (norm.square() < precision.tiny) | (norm <= 8 * precision.eps * whole)
            norm = norm.masked_fill(none, 0.0)
            for place, state in enumerate(self.states):
                state["norm"] = norm[place].clone()
                state["update_norm_sq"] = torch.zeros_like(state["norm"])
                state["rotation_step"] = 0
                if mean is not None and learns_mean(group):
                    state["mean"] = mean[place].clone()
                if group["centering"] == "weights":
                    state["centered"] = False
        if float(group["lr"]) != 0 and self.states[0].get("centered") is False:
            yield from center_(weight, self.dims, self.fan_in)
            for state in self.states:
                state["centered"] = True

    def turn(self, weight: Tensor, grad: Tensor) -> Sums[None]:
        """Rotates the weights along their inner directions, and learns what is learned of norms and means."""
        if not learns(self.step.group):
            yield from self._rotate(weight, self._directions(weight, grad), grad)
            return
        learned = yield from take_apart_(weight, grad, self.states, self.step.group, self.dims)
        grad = grad * learned.scale
        # A weight with a negative gain turns the other way than its direction.
        update = self._directions(weight / learned.scale, grad).mul_(sign(learned.scale))
        yield from self._rotate(weight, update, grad)
        learned.learn_(self.states, self.step.inner, self.step.group)
        learned.put_together_(weight, self.states, self.smallest)

    def _directions(self, weight: Tensor, grad: Tensor) -> Tensor:
        grads, weights = list(grad.unbind()), list(weight.unbind())
        return stacked(self.step.inner.directions(grads, weights, self.states, self.step.group, rotates=True))

    def _rotate(self, weight: Tensor, update: Tensor, grad: Tensor) -> Sums[None]:
        inner, group = self.step.inner, self.step.group
        update_norm_sq = stacked([state["update_norm_sq"] for state in self.states])
        count = self.states[0]["rotation_step"] + 1
        # What forgets faster than momentum would turn a neuron without gradients at full angle on stale momentum.
        forgetful = group["update_norm_decay"] < inner.momentum(group) ** 2
        learns = (yield (grad != 0).sum(self.dims, keepdim=True)) > 0 if forgetful else None
        corrected = group["transient_correction"]
        yield from rotate_(
            weight,
            update,
            norm=stacked([state["norm"] for state in self.states]),
            update_norm_sq=update_norm_sq,
            step=count,
            angle=self.step.angle,
            lr=float(group["lr"]),
            decay=group["update_norm_decay"],
            eps=group["rotational_eps"],
            dims=self.dims,
            fan_in=self.fan_in,
            center=group["centering"] != "none",
            relative_size_sq=inner.relative_size_sq(group, age(self.states[0])) if corrected else 1.0,
            learns=learns,
        )
        for state in self.states:
            state["rotation_step"] = count
        if len(self.states) > 1:
            torch._foreach_copy_([state["update_norm_sq"] for state in self.states], list(update_norm_sq.unbind()))


def check_dense(parameter: Tensor) -> None:
    """Raises ``RuntimeError`` if the parameter's gradient is sparse."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise RuntimeError(
            "Rotational optimizers do not support sparse gradients, and the parameter of shape "
            f"{tuple(parameter.shape)} has one: build the embedding with sparse=False"
        )


def age(state: State) -> int:
    """How many gradients the moments in a state have seen: more than it has rotated by, if it was taken over."""
    return int(state["step"]) if "step" in state else int(state.get("rotation_step", 0))
