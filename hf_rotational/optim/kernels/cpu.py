"""The CPU kernel's side in Python: which tensors it steps, and the table that tells it where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hf_rotational.optim.gains import learns
from hf_rotational.optim.groups import neuron_span
from hf_rotational.optim.inner import SGD, Adam, AdamW, Group, Inner, Lion, State
from hf_rotational.optim.kernels.build import kernel, unavailable
from hf_rotational.optim.sharding import is_sharded, local, local_as, split_over
from hf_rotational.optim.step import Step, age, check_dense

KINDS: dict[type[Inner], int] = {AdamW: 0, Adam: 0, SGD: 1, Lion: 3}
"""Inner updates that the kernel has, with their numbers in it. SGD without momentum has the next one."""
SCRATCH = 4 << 20
"""Entries of a thread's scratch memory, of which a step touches what one neuron, or one matrix of columns, needs."""
WIDEST = 4096
"""Columns that the kernel sums up side by side."""

# The structs of cpu.c.
GROUP = np.dtype(
    [(name, "i8") for name in ("kind", "nesterov", "center", "forgetful", "maximize", "decoupled")]
    + [(name, "f8") for name in ("lr", "angle", "beta1", "beta2", "eps", "weight_decay", "dampening")]
    + [(name, "f8") for name in ("decay", "rotational_eps")]
)
TENSOR = np.dtype(
    [(name, "i8") for name in ("group", "grad", "weight", "first", "second", "step", "update_norm_sq", "norm")]
    + [(name, "i8") for name in ("batch", "outer", "neurons", "inner", "rotation_step")]
    + [("relative_size_sq", "f8"), ("blocks", "i8"), ("late", "f8"), ("factors", "f4", (8,))]
)
# Settings that decide what the kernel takes, and which state it needs for that.
DECISIVE = ("backend", "rotational", "neuron_dims", "granularity", "centering", "gains", "momentum")


class FusedStep:
    """Steps of one optimizer by the kernel. Keeps its table from step to step, for as long as it holds."""

    def __init__(self, inner: Inner) -> None:
        self._inner = inner
        self._made_for: object = None
        self._scratch = np.empty(0)
        self._parameters: list[Tensor] = []
        """That the kernel steps, in the order of the table."""
        self._numbers: list[int] = []
        """Of their groups."""
        self._names: list[tuple[str, ...]] = []
        """Of their state's tensors that the kernel needs."""
        self._waiting: list[Tensor] = []
        """That it could step, had they a state: to look at again when they get a gradient."""
        self._rest: list[list[Tensor]] = []

    def step(
        self, groups: list[Group], states: Mapping[Tensor, State], target_rotation: Callable[[Group], float]
    ) -> list[list[Tensor]]:
        """Takes the step of every parameter that the kernel can; returns, for each group, those that are left.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        if type(self._inner) not in KINDS or torch.compiler.is_compiling():
            return [group["params"] for group in groups]
        made_for = [(tuple(map(id, group["params"])), *map(group.get, DECISIVE)) for group in groups]
        if made_for != self._made_for or not self._holds(states):
            self._make(groups, states)
            self._made_for = made_for
        if self._parameters:
            self._call(groups, [states[parameter] for parameter in self._parameters], target_rotation)
        return self._rest

    def _holds(self, states: Mapping[Tensor, State]) -> bool:
        """Whether tensors are where the table says: any of them may have been replaced, as loading does."""
        if any(parameter.grad is not None for parameter in self._waiting):
            return False
        try:
            kept = [states[parameter] for parameter in self._parameters]
            return self._addresses == self._addresses_of(self._parameters, kept)
        except (KeyError, RuntimeError):  # a tensor without memory
            return False

    def _addresses_of(self, parameters: list[Tensor], states: list[State]) -> list[int]:
        tensors = [
            *parameters,
            *(state[name] for state, names in zip(states, self._names, strict=True) for name in names),
        ]
        return [tensor.data_ptr() for tensor in (map(local, tensors) if self._sharded else tensors)]

    def _make(self, groups: list[Group], states: Mapping[Tensor, State]) -> None:
        self._parameters, self._waiting, self._rest, self._names = [], [], [[] for _ in groups], []
        layouts: list[tuple[int, ...]] = []
        self._numbers = []
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                dims = neuron_span(parameter, group)
                layout = layout_of(parameter, dims) if takes(parameter, group, dims) else None
                if layout is None:
                    self._rest[number].append(parameter)
                elif parameter.grad is None and not self._is_ready(states.get(parameter, {}), dims, group):
                    self._waiting.append(parameter)
                else:
                    state = states[parameter]
                    if not self._is_ready(state, dims, group):
                        check_dense(parameter)
                        Step(self._inner, group, dims, 0.0).prepare(parameter, state)
                    names = (*self._inner.buffers(group), "step", *(("update_norm_sq", "norm") if dims else ()))
                    if not all(readable(state[name]) for name in names):
                        self._rest[number].append(parameter)
                        continue
                    if state.get("centered") is False:  # will be, with the first step that moves it
                        self._waiting.append(parameter)
                    self._parameters.append(parameter)
                    self._names.append(names)
                    self._numbers.append(number)
                    layouts.append(layout)
        self._turning = {number for number, names in zip(self._numbers, self._names, strict=True) if "norm" in names}
        self._sharded = any(map(is_sharded, self._parameters))
        self._fill(groups, layouts, states)

    def _is_ready(self, state: State, dims: tuple[int, ...], group: Group) -> bool:
        needed = {*self._inner.buffers(group), "step", *(("norm",) if dims else ())}
        return needed <= state.keys() and (state.get("centered") is not False or float(group["lr"]) == 0)

    def _fill(self, groups: list[Group], layouts: list[tuple[int, ...]], states: Mapping[Tensor, State]) -> None:
        kept = [states[parameter] for parameter in self._parameters]
        self._addresses = self._addresses_of(self._parameters, kept)
        self._groups, self._tensors = np.zeros(len(groups), GROUP), np.zeros(len(self._parameters), TENSOR)
        self._tensors["group"] = self._groups.ctypes.data + GROUP.itemsize * np.array(self._numbers, dtype=np.int64)
        self._tensors["weight"] = self._addresses[: len(self._parameters)]
        rest = iter(self._addresses[len(self._parameters) :])
        fields = dict(zip(("exp_avg", "momentum_buffer", "exp_avg_sq"), ("first", "first", "second"), strict=True))
        for row, names in zip(self._tensors, self._names, strict=True):
            for name in names:
                row[fields.get(name, name)] = next(rest)
        for field, sizes in zip(("batch", "outer", "neurons", "inner"), zip(*layouts, strict=True), strict=False):
            self._tensors[field] = sizes

    def _call(self, groups: list[Group], states: list[State], target_rotation: Callable[[Group], float]) -> None:
        grads = [self._grad(parameter) for parameter in self._parameters]
        for number, group in enumerate(groups):
            self._groups[number] = self._settings(group, target_rotation(group) if number in self._turning else 0.0)
        table, sizes_sq = self._tensors, {}
        table["grad"] = [0 if grad is None else grad.data_ptr() for grad in grads]
        table["rotation_step"] = [state.get("rotation_step", 0) + 1 for state in states]
        table["relative_size_sq"] = 1.0
        for place, number in enumerate(self._numbers):
            if groups[number]["transient_correction"] and "norm" in states[place] and grads[place] is not None:
                key = (number, age(states[place]) + 1)
                if key not in sizes_sq:
                    sizes_sq[key] = self._inner.relative_size_sq(groups[number], key[1])
                table["relative_size_sq"][place] = sizes_sq[key]
        threads = torch.get_num_threads()
        if len(self._scratch) < threads * SCRATCH // 2:
            self._scratch = np.empty(threads * SCRATCH // 2 + 8)  # memory that is not touched takes up no room
        start = -(-self._scratch.ctypes.data // 64) * 64  # of a cache line
        kernel()(table.ctypes.data, len(table), threads, start, SCRATCH)
        moved = [parameter for parameter, grad in zip(self._parameters, grads, strict=True) if grad is not None]
        torch.autograd.graph.increment_version(moved)  # or a graph could be walked back with changed weights, unnoticed
        for state, grad in zip(states, grads, strict=True):
            if grad is not None and "norm" in state:
                state["rotation_step"] += 1

    def _grad(self, parameter: Tensor) -> Tensor | None:
        grad = parameter.grad
        if grad is None:
            return None
        if type(grad) is not Tensor or grad.dtype is not torch.float32 or not grad.is_contiguous():
            check_dense(parameter)
            grad = local_as(grad, parameter).to(torch.float32).contiguous()
        return grad

    def _settings(self, group: Group, angle: float) -> tuple[float, ...]:
        inner, momentum = self._inner, self._inner.momentum(group)
        kind = KINDS[type(inner)] + (isinstance(inner, SGD) and momentum == 0)
        return (
            kind,
            group.get("nesterov", False),
            group["centering"] != "none",
            group["update_norm_decay"] < momentum**2,
            group["maximize"],
            inner.decoupled,
            float(group["lr"]),
            angle,
            momentum,
            group["betas"][1] if "betas" in group else 0.0,
            group.get("eps", 0.0),
            group["weight_decay"],
            group.get("dampening", 0.0),
            group["update_norm_decay"],
            group["rotational_eps"],
        )


def takes(parameter: Tensor, group: Group, dims: tuple[int, ...]) -> bool:
    """Whether the kernel can step a parameter whose neurons span ``dims``, and is asked to."""
    if group["backend"] not in ("auto", "fused") or parameter.device.type != "cpu" or (learns(group) and dims):
        return False
    part = local(parameter.detach())
    return (
        readable(part)
        and (is_sharded(parameter) or type(parameter) in (Tensor, nn.Parameter))
        and type(part) is Tensor
        and not split_over(parameter, dims)
        and unavailable() is None
    )


def readable(tensor: Tensor) -> bool:
    """Whether C can read it: float32 numbers in one piece, in the order of its dims."""
    part = local(tensor)
    return (
        part.dtype is torch.float32
        and part.device.type == "cpu"
        and part.layout is torch.strided
        and part.is_contiguous()
        and not part.is_neg()
        and part.numel() > 0
        and part.data_ptr() != 0
    )


def layout_of(parameter: Tensor, dims: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The part of a parameter on this rank as (batch, outer, neurons, inner), where neurons span outer and inner.

    ``None`` if its dims alternate more often, or its columns are too wide.
    """
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
