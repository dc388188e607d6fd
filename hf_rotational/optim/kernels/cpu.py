"""The CPU kernel's side in Python: which tensors it steps, and the table that tells it where they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from hf_rotational.optim.gains import learns
from hf_rotational.optim.inner import SGD, Adam, AdamW, Group, Inner, Lion, State
from hf_rotational.optim.kernels.base import KernelStep, Layout, layout_of, readable
from hf_rotational.optim.kernels.build import kernel, unavailable
from hf_rotational.optim.sharding import is_sharded, local, split_over
from hf_rotational.optim.step import Step, age

KINDS: dict[type[Inner], int] = {AdamW: 0, Adam: 0, SGD: 1, Lion: 3}
"""Inner updates that the kernel has, with their numbers in it. SGD without momentum has the next one."""
SCRATCH = 4 << 20
"""Most entries of a thread's scratch memory: what one neuron, or one matrix of columns, needs."""

# Of cpu.c: columns and entries taken at a time, entries that short neurons and sums of columns need, and the structs.
PANEL, BLOCK, SHORT, TABLES = 4096, 32768, 8192, 61_824
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


class FusedStep(KernelStep):
    """Steps of one optimizer by the kernel."""

    inners = frozenset(KINDS)
    dtypes = (torch.float32,)

    def __init__(self, inner: Inner) -> None:
        super().__init__(inner)
        self._scratch = np.empty(0)

    def _layout(self, parameter: Tensor, group: Group, dims: tuple[int, ...]) -> Layout | None:
        return layout_of(parameter, dims) if takes(parameter, group, dims) else None

    def _prepare(self, step: Step, parameter: Tensor, state: State, place: int) -> bool:
        step.prepare(parameter, state)
        return True

    def _fill(self, groups: list[Group], tensors: list[Tensor]) -> None:
        members = self._members
        self._turning = {member.number for member in members if member.dims}
        self._groups, self._table = np.zeros(len(groups), GROUP), np.zeros(len(members), TENSOR)
        table = self._table
        table["group"] = [self._groups.ctypes.data + GROUP.itemsize * member.number for member in members]
        table["weight"] = [tensor.data_ptr() for tensor in tensors[: len(members)]]
        rest = iter(tensors[len(members) :])
        fields = dict(zip(("exp_avg", "momentum_buffer", "exp_avg_sq"), ("first", "first", "second"), strict=True))
        for row, member in zip(table, members, strict=True):
            for name in member.names:
                row[fields.get(name, name)] = next(rest).data_ptr()
        layouts = zip(*(member.layout for member in members), strict=True)
        for field, sizes in zip(("batch", "outer", "neurons", "inner"), layouts, strict=False):
            table[field] = sizes
        self._size = min(SCRATCH, max((scratch_for(member.layout) for member in members), default=0))
        self._most_threads = sum(batch + math.prod(rest) // PANEL for batch, *rest in (m.layout for m in members))

    def _call(self, groups: list[Group], states: list[State], target_rotation: Callable[[Group], float]) -> None:
        grads = self._grads()
        for number, group in enumerate(groups):
            self._groups[number] = self._settings(group, target_rotation(group) if number in self._turning else 0.0)
        table = self._table
        table["grad"] = [0 if grad is None else grad.data_ptr() for grad in grads]
        table["rotation_step"] = [state.get("rotation_step", 0) + 1 for state in states]
        table["relative_size_sq"] = self._relative_sizes_sq(groups, states, grads)
        threads = min(torch.get_num_threads(), self._most_threads)
        if len(self._scratch) < threads * self._size // 2 + 8:
            self._scratch = np.empty(threads * self._size // 2 + 8)  # memory that is not touched takes up no room
        start = -(-self._scratch.ctypes.data // 64) * 64  # of a cache line
        # Counts first: after the kernel none of this is in cache any more, and with small tensors that shows.
        moved = [parameter for parameter, grad in zip(self._parameters, grads, strict=True) if grad is not None]
        torch.autograd.graph.increment_version(moved)  # or a graph could be walked back with changed weights, unnoticed
        for state, grad in zip(states, grads, strict=True):
            if grad is not None and "norm" in state:
                state["rotation_step"] += 1
        kernel()(table.ctypes.data, len(table), threads, start, self._size)

    def _relative_sizes_sq(
        self, groups: list[Group], states: list[State], grads: list[Tensor | None]
    ) -> float | list[float]:
        """Of the members' updates: how large the inner update's are yet to be, squared, after so many steps."""
        if not any(group["transient_correction"] for group in groups):
            return 1.0
        known: dict[tuple[int, int], float] = {}
        sizes_sq = []
        for member, state, grad in zip(self._members, states, grads, strict=True):
            corrected = groups[member.number]["transient_correction"] and member.dims and grad is not None
            key = (member.number, age(state) + 1) if corrected else None
            if key is not None and key not in known:
                known[key] = self._inner.relative_size_sq(groups[member.number], key[1])
            sizes_sq.append(1.0 if key is None else known[key])
        return sizes_sq

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


def scratch_for(layout: Layout) -> int:
    """Entries of scratch memory with which no direction is worked out twice; a multiple of a cache line's."""
    _, outer, neurons, inner = layout
    entries = TABLES + min(PANEL, neurons * inner) * outer if outer > 1 else max(SHORT, inner)
    return (entries // 16 + 2) * 16


def takes(parameter: Tensor, group: Group, dims: tuple[int, ...]) -> bool:
    """Whether the kernel can step a parameter whose neurons span ``dims``, and is asked to."""
    if group["backend"] not in ("auto", "fused") or parameter.device.type != "cpu" or (learns(group) and dims):
        return False
    part = local(parameter.detach())
    return (
        readable(part, "weight", part)
        and part.numel() > 0
        and part.device.type == "cpu"
        and (is_sharded(parameter) or type(parameter) in (Tensor, nn.Parameter))
        and type(part) is Tensor
        and not split_over(parameter, dims)
        and unavailable() is None
    )
