"""The one step: an inner direction, then rotation for what rotates, the plain update for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rotational.optim import gains, precision
from hf_rotational.optim.blocks import Part, blocks, side_by_side
from hf_rotational.optim.groups import holds_mean
from hf_rotational.optim.inner import Group, Inner, State, count_steps, counter
from hf_rotational.optim.rotation import center_, neuron_norm, rotate_
from hf_rotational.optim.sharding import Sums, alone, local, local_as, shard_number, split_over, stacked
from hf_rotational.optim.state import keep, state_here


@dataclass(frozen=True)
class Step:
    """One step of parameters that share a group, dtype, device, a history and, if they rotate, a shape."""

    inner: Inner
    group: Group
    dims: tuple[int, ...]
    """What one neuron spans; empty if the parameters do not rotate."""
    angle: float
    """That they turn by, in radians."""

    def take(self, parameters: list[Tensor], kept: list[State], places: list[int]) -> Sums[None]:
        """Takes the step, on the parts of the parameters that are on this rank, on a CPU block by block.

        Args:
            parameters: with gradients.
            kept: their states.
            places: of each in its optimizer; they seed stochastic rounding, so that replicas round alike.
        """
        stored = [local(parameter.detach()) for parameter in parameters]
        grads = [self._grad(parameter) for parameter in parameters]
        states = [state_here(state, parameter) for state, parameter in zip(kept, parameters, strict=True)]
        for part, state in zip(stored, states, strict=True):
            self._prepare_moments(state, part)
        # Where neurons are split over ranks, each block would wait for the others' sums.
        together = bool(split_over(parameters[0], self.dims))
        turn = self._turn(parameters[0])
        if turn and "norm" not in states[0]:
            for some in [slice(None)] if together else [slice(place, place + 1) for place in range(len(stored))]:
                yield from turn.measure(stored[some], states[some])
        self._count(states)
        tensors = [
            Part(part, grad, state, self._draws(part, state, (shard_number(parameter) << 16) + place))
            for parameter, part, grad, state, place in zip(parameters, stored, grads, states, places, strict=True)
        ]
        for some, cuts in [(slice(None), [()])] if together else blocks(stored, self.dims):
            runs = [
                self._take_block([tensor.at(cut, self.dims, first=cut is cuts[0]) for tensor in tensors[some]], turn)
                for cut in cuts
            ]
            yield from side_by_side(runs)
        for parameter, state, whole in zip(parameters, states, kept, strict=True):
            if self.moves and "centered" in state:
                state["centered"] = True
            keep(state, whole, parameter, self.dims)

    def _take_block(self, parts: list[Part], turn: _Turn | None) -> Sums[None]:
        """Takes the step of one block of some tensors."""
        rounding = self.group["rounding"]
        weights = [precision.read(part.stored, part.state, rounding) for part in parts]
        grads = [part.grad.to(weights[0].dtype) for part in parts]
        states = [part.state for part in parts]
        if self.group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if turn:
            yield from turn.take(weights, grads, states)
        else:
            updates = [torch.empty_like(weight) for weight in weights]
            self.inner.directions_into(updates, grads, weights, states, self.group, rotates=False)
            self.inner.descend_(weights, updates, self.group)
        if self.moves:
            for part, weight in zip(parts, weights, strict=True):
                precision.write(part.stored, weight, part.state, rounding, part.draws)

    def prepare(self, parameter: Tensor, kept: State) -> None:
        """Makes the state of a float32 parameter whose neurons are whole on this rank, and centres its weights if they
        are to be: what :meth:`take` does before anything else."""
        part, state = local(parameter.detach()), state_here(kept, parameter)
        self._prepare_moments(state, part)
        if turn := self._turn(parameter):
            if "norm" not in state:
                alone(turn.measure([part], [state]))
            if self.moves and state.get("centered") is False:
                alone(center_(part, self.dims, turn.fan_in))
                state["centered"] = True
        keep(state, kept, parameter, self.dims)

    @property
    def moves(self) -> bool:
        """Whether weights are to change: with ``lr == 0`` only their state does."""
        return float(self.group["lr"]) != 0

    def _draws(self, part: Tensor, state: State, place: int) -> torch.Generator | None:
        return precision.prepare(part, state, self.group["rounding"], place, moves=self.moves)

    def _turn(self, parameter: Tensor) -> _Turn | None:
        if not self.dims:
            return None
        fan_in = math.prod(parameter.shape[dim] for dim in self.dims)
        smallest = gains.smallest_norm(fan_in, parameter.dtype, precision.compute_dtype(parameter))
        return _Turn(self, tuple(dim + 1 for dim in self.dims), fan_in, smallest)

    def _grad(self, parameter: Tensor) -> Tensor:
        check_dense(parameter)
        grad = parameter.grad
        assert grad is not None
        return local_as(grad, parameter)

    def _prepare_moments(self, state: State, part: Tensor) -> None:
        """Makes what is missing, so that moments another optimizer left are taken over as they are."""
        missing = [name for name in self.inner.buffers(self.group) if name not in state]
        if "step" not in state and self.inner.counts_steps:
            # Moments that are there already have seen a gradient.
            state["step"] = counter(0.0 if missing or not self.inner.buffers(self.group) else 1.0)
        for name in missing:
            state[name] = torch.zeros_like(part, dtype=precision.compute_dtype(part))

    def _count(self, states: list[State]) -> None:
        """Counts this step, of which each block of a tensor is a part."""
        if self.inner.counts_steps:
            count_steps(states)
        if self.dims:
            for state in states:
                state["rotation_step"] += 1
            gains.count(states, self.inner, self.group)


@dataclass(frozen=True)
class _Turn:
    """The step of rotating tensors, or of blocks of them, that have one shape and are stacked along a new dim 0."""

    step: Step
    dims: tuple[int, ...]
    """What one neuron spans in the stack."""
    fan_in: int
    smallest: float
    """Norm that a neuron with a learned gain keeps."""

    def measure(self, stored: list[Tensor], states: list[State]) -> Sums[None]:
        """Measures, before weights first move, what is held of their neurons."""
        group = self.step.group
        weight = stacked(stored).to(precision.compute_dtype(stored[0]))
        start, mean = weight, None
        if holds_mean(group):
            start = weight.clone()
            mean = yield from center_(start, self.dims, self.fan_in)
        norm = yield from self._norm(start)
        whole = (yield from self._norm(weight)) if holds_mean(group) else norm
        number = torch.finfo(weight.dtype)
        # As good as 0: a norm whose square underflows (its reciprocal would not be finite), and the rounding that
        # centring leaves of a constant neuron.
        none = (norm.square() < number.tiny) | (norm <= 8 * number.eps * whole)
        norm = norm.masked_fill(none, 0.0)
        for place, state in enumerate(states):
            state["norm"] = norm[place].clone()
            state["update_norm_sq"] = torch.zeros_like(state["norm"])
            state["rotation_step"] = 0
            if mean is not None and gains.learns_mean(group):
                state["mean"] = mean[place].clone()
            if group["centering"] == "weights":
                state["centered"] = False

    def _norm(self, weight: Tensor) -> Sums[Tensor]:
        # Torch's sums depend on the number of threads; those in double precision in no digit that is kept.
        norm = yield neuron_norm(weight, self.dims, precision.sum_dtype(weight)).square()
        return norm.sqrt().to(weight.dtype)

    def take(self, weights: list[Tensor], grads: list[Tensor], states: list[State]) -> Sums[None]:
        """Rotates weights, in place, along their inner directions, and learns what is learned of norms and means."""
        moves = self.step.moves
        # A single weight is stacked as a view, so what happens to the stack happens to it.
        weight = stacked(weights if moves else [weight.clone() for weight in weights])
        if moves and states[0].get("centered") is False:
            yield from center_(weight, self.dims, self.fan_in)
        if gains.learns(self.step.group):
            yield from self._turn_and_learn(weight, stacked(grads), states)
        else:
            yield from self._rotate(weight, self._directions(weight, grads, states), grads, states)
        if moves and len(weights) > 1:
            torch._foreach_copy_(weights, list(weight.unbind()))

    def _turn_and_learn(self, weight: Tensor, grad: Tensor, states: list[State]) -> Sums[None]:
        group = self.step.group
        learned = yield from gains.take_apart_(weight, grad, states, group, self.dims)
        grads = list((grad * learned.scale).unbind())
        # A weight with a negative gain turns the other way than its direction.
        update = self._directions(weight / learned.scale, grads, states).mul_(gains.sign(learned.scale))
        yield from self._rotate(weight, update, grads, states)
        learned.learn_(states, self.step.inner, group)
        learned.put_together_(weight, states, self.smallest)

    def _directions(self, weight: Tensor, grads: list[Tensor], states: list[State]) -> Tensor:
        update = torch.empty_like(weight)
        weights, updates = list(weight.unbind()), list(update.unbind())
        self.step.inner.directions_into(updates, grads, weights, states, self.step.group, rotates=True)
        return update

    def _rotate(self, weight: Tensor, update: Tensor, grads: list[Tensor], states: list[State]) -> Sums[None]:
        inner, group = self.step.inner, self.step.group
        update_norm_sq = stacked([state["update_norm_sq"] for state in states])
        # What forgets faster than momentum would turn a neuron without gradients at full angle on stale momentum.
        forgetful = group["update_norm_decay"] < inner.momentum(group) ** 2
        learns = (yield (stacked(grads) != 0).sum(self.dims, keepdim=True)) > 0 if forgetful else None
        corrected = group["transient_correction"]
        yield from rotate_(
            weight,
            update,
            norm=stacked([state["norm"] for state in states]),
            update_norm_sq=update_norm_sq,
            step=states[0]["rotation_step"],
            angle=self.step.angle,
            lr=float(group["lr"]),
            decay=group["update_norm_decay"],
            eps=group["rotational_eps"],
            dims=self.dims,
            fan_in=self.fan_in,
            center=group["centering"] != "none",
            relative_size_sq=inner.relative_size_sq(group, age(states[0])) if corrected else 1.0,
            learns=learns,
        )
        if len(states) > 1:
            torch._foreach_copy_([state["update_norm_sq"] for state in states], list(update_norm_sq.unbind()))


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
