"""What the CPU's and the CUDA kernel's sides share: which tensors a kernel steps, kept for as long as that holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from operator import is_
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_rotational.optim.groups import neuron_span
from hf_rotational.optim.inner import Group, Inner, State
from hf_rotational.optim.precision import COMPENSATION
from hf_rotational.optim.sharding import is_sharded, local, local_as, shard_number
from hf_rotational.optim.step import Step, check_dense

Layout = tuple[int, int, int, int]
"""Of a tensor's part on this rank: (batch, outer, neurons, inner), where neurons span outer and inner."""
WIDEST = 4096
"""Columns that the CPU's kernel sums up side by side."""
DECISIVE = ("backend", "rotational", "neuron_dims", "granularity", "centering", "gains", "rounding", "capturable")
"""Settings that, with the inner's buffers, decide what a kernel takes and which state it needs for that."""


class Member(NamedTuple):
    """A parameter that a kernel steps."""

    parameter: Tensor
    number: int
    """Of its group."""
    place: int
    """In its optimizer, and of its shard: it seeds stochastic rounding, so that replicas round alike."""
    dims: tuple[int, ...]
    """What one neuron spans; empty if it does not rotate."""
    layout: Layout
    names: tuple[str, ...]
    """Of its state's tensors that the kernel needs."""


class KernelStep(ABC):
    """Steps of one optimizer by one kernel."""

    inners: ClassVar[frozenset[type[Inner]]]
    """Inner updates that the kernel has."""
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    """Of gradients that it reads; others are cast to their parameter's."""

    def __init__(self, inner: Inner) -> None:
        self._inner = inner
        self._chosen_by: object = None
        """Settings by which the members were chosen."""
        self._keys: list[Tensor] = []
        """Parameters they were chosen from, and then those that had a state."""
        self._members: list[Member] = []
        self._parameters: list[Tensor] = []
        """The members', and in the next list the names of their state's tensors: by themselves, to be fast."""
        self._state_names: list[tuple[str, ...]] = []
        self._readable = {(Tensor, torch.strided, dtype) for dtype in self.dtypes}
        """Kinds of gradients that need no conversion, if they are contiguous."""
        self._waiting: list[Tensor] = []
        """That the kernel could step, had they all their state: to look at again when they get a gradient."""
        self._rest: list[list[Tensor]] = []
        self._sharded = False

    def step(
        self,
        groups: list[Group],
        left: list[list[Tensor]],
        states: Mapping[Tensor, State],
        target_rotation: Callable[[Group], float],
    ) -> list[list[Tensor]]:
        """Takes the step of every parameter that the kernel can.

        Args:
            groups: the optimizer's.
            left: the parameters of each that are to be stepped.
            states: of the parameters.
            target_rotation: angle of a group, in radians per step.

        Returns:
            The parameters of each group that are left.

        Raises:
            RuntimeError: for a sparse gradient, and if the kernel was asked for and cannot be had.
        """
        if type(self._inner) not in self.inners or torch.compiler.is_compiling():
            return left
        settings = [
            (len(parameters), self._inner.buffers(group), *map(group.get, DECISIVE))
            for group, parameters in zip(groups, left, strict=True)
        ]
        kept = self._kept(left, states) if settings == self._chosen_by else None
        if kept is None or not self._holds(kept):
            self._chosen_by = None  # for as long as making fails
            kept = self._make(groups, left, states, target_rotation)
            self._chosen_by = settings
        if self._members:
            self._call(groups, kept, target_rotation)
        return self._rest

    def forget(self) -> None:
        """Looks at all parameters anew at the next step: for callers that see shapes change."""
        self._chosen_by = None

    @abstractmethod
    def _layout(self, parameter: Tensor, group: Group, dims: tuple[int, ...]) -> Layout | None:
        """How the kernel sees a parameter whose neurons span ``dims``; ``None`` if it cannot step it or is not to."""

    def _counts_itself(self, group: Group) -> bool:
        """Whether the kernel counts a group's steps itself, on the device."""
        return False

    @abstractmethod
    def _prepare(self, step: Step, parameter: Tensor, state: State, place: int) -> bool:
        """Makes what a parameter's state lacks; returns whether the kernel may step it now. If not, this has."""

    @abstractmethod
    def _fill(self, groups: list[Group], tensors: list[Tensor]) -> None:
        """Takes over where the members' tensors are, in the order of :meth:`_tensors`. Is not to keep them alive."""

    @abstractmethod
    def _call(self, groups: list[Group], states: list[State], target_rotation: Callable[[Group], float]) -> None:
        """Steps the members that have gradients."""

    def _kept(self, left: list[list[Tensor]], states: Mapping[Tensor, State]) -> list[State] | None:
        """The members' states, unless the parameters have changed. Without hashing tensors, which is slow."""
        keys = [*chain.from_iterable(left), *states]
        if len(keys) != len(self._keys) or not all(map(is_, keys, self._keys)):
            return None
        kept = list(states.values())
        return [kept[position] for position in self._positions]

    def _holds(self, states: list[State]) -> bool:
        """Whether tensors are what and where they were: any may have been replaced, as loading and moving them do."""
        if any(parameter.grad is not None for parameter in self._waiting):
            return False
        try:
            return self._found == self._look(self._tensors(states))
        except (KeyError, RuntimeError):  # a tensor without memory
            return False

    def _tensors(self, states: list[State]) -> list[Tensor]:
        """What of the members' weights, and then of each one's state, is on this rank."""
        tensors = [*self._parameters]
        tensors += [state[name] for state, names in zip(states, self._state_names, strict=True) for name in names]
        return list(map(local, tensors)) if self._sharded else tensors

    def _look(self, tensors: list[Tensor]) -> list[object]:
        """What must stay as it is for the kernel to be told nothing new: an address may be another weight's by now."""
        weights = tensors[: len(self._members)]
        return [
            *map(Tensor.data_ptr, tensors),
            *[weight.dtype for weight in weights],
            *map(Tensor.is_contiguous, weights),
        ]

    def _make(
        self,
        groups: list[Group],
        left: list[list[Tensor]],
        states: Mapping[Tensor, State],
        target_rotation: Callable[[Group], float],
    ) -> list[State]:
        """Finds out what the kernel takes, and makes what their states lack; returns the members' states."""
        self._members, self._waiting, self._rest = [], [], [[] for _ in groups]
        places = {parameter: place for place, parameter in enumerate(p for group in groups for p in group["params"])}
        for number, (group, parameters) in enumerate(zip(groups, left, strict=True)):
            for parameter in parameters:
                dims = neuron_span(parameter, group)
                layout = self._layout(parameter, group, dims)
                if layout is None:
                    self._rest[number].append(parameter)
                    continue
                names, state = self._names(parameter, group, dims), states.get(parameter, {})
                if not set(names) <= state.keys() or state.get("centered") is False:
                    if parameter.grad is None:
                        self._waiting.append(parameter)
                        continue
                    check_dense(parameter)
                    step = Step(self._inner, group, dims, target_rotation(group) if dims else 0.0)
                    state = states[parameter]
                    if not self._prepare(step, parameter, state, places[parameter]):
                        self._waiting.append(parameter)
                        continue
                keep_counters(state, parameter.device if self._counts_itself(group) else None)
                if not all(readable(state[name], name, parameter) for name in names):
                    self._rest[number].append(parameter)
                    continue
                if state.get("centered") is False:  # will be, with the first step that moves it
                    self._waiting.append(parameter)
                place = (shard_number(parameter) << 16) + places[parameter]
                self._members.append(Member(parameter, number, place, dims, layout, names))
        self._sharded = any(is_sharded(member.parameter) for member in self._members)
        self._keys = [*chain.from_iterable(left), *states]
        positions = {parameter: position for position, parameter in enumerate(states)}
        self._positions = [positions[member.parameter] for member in self._members]
        self._parameters = [member.parameter for member in self._members]
        self._state_names = [member.names for member in self._members]
        kept = [states[parameter] for parameter in self._parameters]
        tensors = self._tensors(kept)
        self._found = self._look(tensors)
        self._fill(groups, tensors)
        return kept

    def _names(self, parameter: Tensor, group: Group, dims: tuple[int, ...]) -> tuple[str, ...]:
        of_neurons: tuple[str, ...] = ("norm", "update_norm_sq") if dims else ()
        if dims and self._counts_itself(group):
            of_neurons += ("rotation_step",)
        remainder = (COMPENSATION,) if group["rounding"] == "kahan" and parameter.dtype != torch.float32 else ()
        return (*self._inner.buffers(group), "step", *of_neurons, *remainder)

    def _grads(self) -> list[Tensor | None]:
        """The members' gradients as the kernel reads them."""
        grads = [parameter.grad for parameter in self._parameters]
        given = [grad for grad in grads if grad is not None]
        kinds = {(type(grad), grad.layout, grad.dtype) for grad in given}
        if kinds <= self._readable and all(map(Tensor.is_contiguous, given)):
            return grads
        return [
            grad if grad is None else self._read(grad, parameter)
            for grad, parameter in zip(grads, self._parameters, strict=True)
        ]

    def _read(self, grad: Tensor, parameter: Tensor) -> Tensor:
        check_dense(parameter)
        grad = local_as(grad, parameter)
        return (grad if grad.dtype in self.dtypes else grad.to(parameter.dtype)).contiguous()


def keep_counters(state: State, device: torch.device | None) -> None:
    """Keeps counters on the device, or where the host has them at hand: those of a state that was loaded may be
    elsewhere, or whole numbers."""
    state["step"] = torch.as_tensor(state["step"]).to(device or "cpu", torch.float32)
    if device is not None and "rotation_step" in state:
        state["rotation_step"] = torch.as_tensor(state["rotation_step"]).to(device, torch.float32)
    elif isinstance(state.get("rotation_step"), Tensor):
        state["rotation_step"] = int(state["rotation_step"])


def readable(tensor: Tensor, name: str, parameter: Tensor) -> bool:
    """Whether a kernel can read a tensor of a parameter's state: numbers in one piece, in the order of its dims."""
    part = local(tensor)
    return (
        part.dtype is (parameter.dtype if name == COMPENSATION else torch.float32)
        and (part.device == parameter.device or name == "step")
        and part.layout is torch.strided
        and part.is_contiguous()
        and not part.is_neg()
        and part.data_ptr() != 0
    )


def layout_of(parameter: Tensor, dims: tuple[int, ...]) -> Layout | None:
    """The layout of a parameter whose neurons span ``dims``; ``None`` if dims alternate more often than a layout can
    say, or columns are too wide."""
    shape = local(parameter.detach()).shape
    if not dims:
        return 1, 1, 1, shape.numel()
    runs: list[tuple[bool, int]] = []  # dims of a kind, side by side, are one
    for dim, size in enumerate(shape):
        if size > 1:
            before = runs.pop()[1] if runs and runs[-1][0] == (dim in dims) else 1
            runs.append((dim in dims, before * size))
    if len(runs) <= 1 or [spans for spans, _ in runs] == [False, True]:
        sizes = dict(runs)
        return 1, 1, sizes.get(False, 1), sizes.get(True, 1)
    found = []
    for kind in (False, True, False, True):
        found.append(runs.pop(0)[1] if runs and runs[0][0] == kind else 1)
    batch, outer, neurons, inner = found
    return (batch, outer, neurons, inner) if not runs and inner <= WIDEST else None
