"""The CUDA kernel's side that needs no ``triton``: which tensors it steps, and what it is told in every step.

What changes from step to step (addresses of gradients, learning rate, angle, bias corrections, seeds) are numbers in a
table on the device, which one small copy that nothing waits for brings up to date. So schedules neither recompile nor
synchronize. With ``capturable=True`` steps are counted on the device, and what follows from the count and from a
learning rate that is a tensor is worked out there, so that a CUDA graph may take them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor, nn

from hf_rotational.optim.gains import learns
from hf_rotational.optim.inner import SGD, Adam, AdamW, Group, Inner, Lion, State
from hf_rotational.optim.kernels.base import KernelStep, Layout, Member, layout_of
from hf_rotational.optim.sharding import alone, is_sharded, local, split_over
from hf_rotational.optim.step import Step

if TYPE_CHECKING:
    from hf_rotational.optim.kernels.triton import Launch

DEVICE = "cuda"
OLDEST = "3.4"
"""Version of triton that compiles the kernel."""
KINDS: dict[type[Inner], str] = {AdamW: "adam", Adam: "adam", SGD: "sgd", Lion: "lion"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOADED = 16
"""Bytes that are loaded at a time from addresses that are multiples of it."""


@functools.cache
def unavailable() -> str | None:
    """Why the kernel cannot be used, or ``None`` if it can."""
    try:
        import triton
    except ImportError as error:
        return f"it needs the package triton: {error}"
    if Version(triton.__version__).release < Version(OLDEST).release:
        return f"it needs triton {OLDEST} or newer, and {triton.__version__} is installed"
    return None


class Form(NamedTuple):
    """What a group decides of the code that steps its tensors."""

    kind: str
    """``"adam"``, ``"sgd"`` (no momentum), ``"momentum"``, ``"nesterov"`` or ``"lion"``."""
    centers: bool
    forgetful: bool
    rounding: str
    counts: bool
    """Whether steps are counted on the device."""


class Job(NamedTuple):
    """A member as a launch sees it."""

    row: int
    """Its place among the members."""
    member: Member
    addresses: dict[str, int]
    """Of its ``"weight"`` and of its state's tensors."""
    form: Form
    grad_dtype: torch.dtype
    aligned: bool
    """Whether its weight, gradient and state lie at multiples of :data:`LOADED`."""


class FusedStep(KernelStep):
    """Steps of one optimizer by the kernel. A tensor's first step, which makes its state, is taken without it."""

    inners = frozenset(KINDS)
    dtypes = DTYPES

    def __init__(self, inner: Inner) -> None:
        super().__init__(inner)
        self._captured: list[Launch] = []
        """What CUDA graphs have the addresses of: kept though it may be laid out anew for steps outside of them."""

    def _layout(self, parameter: Tensor, group: Group, dims: tuple[int, ...]) -> Layout | None:
        if not takes(parameter, group, dims):
            return None
        if reason := unavailable():
            raise RuntimeError(f"backend='fused' on {DEVICE}: {reason}. backend='foreach' needs nothing")
        return layout_of(parameter, dims)

    def _make(self, *arguments: Any) -> list[State]:
        check_made()
        return super()._make(*arguments)

    def _counts_itself(self, group: Group) -> bool:
        return bool(group["capturable"])

    def _prepare(self, step: Step, parameter: Tensor, state: State, place: int) -> bool:
        alone(step.take([parameter], [state], [place]))
        return False

    def _fill(self, groups: list[Group], tensors: list[Tensor]) -> None:
        weights, rest = tensors[: len(self._members)], iter(tensors[len(self._members) :])
        self._addresses: list[dict[str, int]] = []
        self._aligned: list[bool] = []
        self._counts: list[memoryview | None] = []
        """Of steps, in the memory of ``state["step"]``: 30 times as fast as adding to tensors. On the device: none."""
        for member, weight in zip(self._members, weights, strict=True):
            here = {"weight": weight, **{name: next(rest) for name in member.names}}
            self._addresses.append({name: tensor.data_ptr() for name, tensor in here.items()})
            shaped = [tensor for tensor in here.values() if tensor.shape == weight.shape]
            self._aligned.append(all(tensor.data_ptr() % LOADED == 0 for tensor in shaped))
            self._counts.append(None if groups[member.number]["capturable"] else here["step"].numpy().data)
        self._kinds = [(member.number, bool(member.dims)) for member in self._members]
        self._seeds = np.array([member.place << 32 for member in self._members], np.int64)
        # How gradients are to be read (as their weights, where none has been seen) and groups' forms decide launches.
        self._reads = [(weight.dtype, True) for weight in weights]
        self._forms: list[Form] = []
        self._launches: list[Launch] = []

    def _call(self, groups: list[Group], states: list[State], target_rotation: Callable[[Group], float]) -> None:
        grads = self._grads()
        self._lay_out(grads, [form_of(self._inner, group) for group in groups])
        rates = [group["lr"].data_ptr() if rate_on_device(group) else 0 for group in groups]
        changing = Changing(
            np.array([0 if grad is None else grad.data_ptr() for grad in grads]),
            self._seeds + np.array([state.get("roundings", 0) + 1 for state in states]),
            np.array([rates[member.number] for member in self._members]),
            self._numbers(groups, states, target_rotation),
        )
        for launch in self._launches:
            launch.take(changing)
            if capturing() and launch not in self._captured:
                self._captured.append(launch)
        # Or a graph could be walked back with changed weights, unnoticed.
        torch.autograd.graph.increment_version(
            [member.parameter for member, grad in zip(self._members, grads, strict=True) if grad is not None]
        )
        self._count(groups, states, grads)

    def _lay_out(self, grads: list[Tensor | None], forms: list[Form]) -> None:
        """Lays launches out anew if gradients are to be read in another way than before, or by other code."""
        from hf_rotational.optim.kernels.triton import lay_out

        reads = [
            read if grad is None else (grad.dtype, grad.data_ptr() % LOADED == 0)
            for grad, read in zip(grads, self._reads, strict=True)
        ]
        if self._launches and reads == self._reads and forms == self._forms:
            return
        jobs = [
            Job(row, member, addresses, forms[member.number], dtype, aligned and grad_aligned)
            for row, (member, addresses, aligned, (dtype, grad_aligned)) in enumerate(
                zip(self._members, self._addresses, self._aligned, reads, strict=True)
            )
        ]
        self._reads, self._forms, self._launches = reads, forms, lay_out(jobs)

    def _numbers(
        self, groups: list[Group], states: list[State], target_rotation: Callable[[Group], float]
    ) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """A row of :func:`numbers_of` per member. Few are different, and worked out."""
        ages = [
            # Counted on the device, where no step is the first one: that makes the state.
            (kind, 2, 2) if count is None else (kind, int(count[()]) + 1, state.get("rotation_step", 0) + 1)
            for kind, count, state in zip(self._kinds, self._counts, states, strict=True)
        ]
        places = {age: place for place, age in enumerate(dict.fromkeys(ages))}
        # A learning rate on the device is read there.
        known = [{**group, "lr": 1.0} if rate_on_device(group) else group for group in groups]
        numbers = [
            numbers_of(self._inner, known[number], target_rotation if rotates else None, count, rotations)
            for (number, rotates), count, rotations in places
        ]
        return np.array(numbers)[[places[age] for age in ages]]

    def _count(self, groups: list[Group], states: list[State], grads: list[Tensor | None]) -> None:
        draws = [
            group["rounding"] == "stochastic" and not group["capturable"] and float(group["lr"]) != 0
            for group in groups
        ]
        for member, count, state, grad in zip(self._members, self._counts, states, grads, strict=True):
            if grad is not None and count is not None:
                count[()] += 1
                if member.dims:
                    state["rotation_step"] += 1
                if draws[member.number] and member.parameter.dtype != torch.float32:
                    state["roundings"] = state.get("roundings", 0) + 1


class Changing(NamedTuple):
    """What may be another in each step, for every member."""

    grads: np.ndarray[Any, Any]
    """Addresses; 0 for those that have none, and are not stepped."""
    seeds: np.ndarray[Any, Any]
    """Of stochastic rounding."""
    rates: np.ndarray[Any, Any]
    """Addresses of learning rates on the device; 0 where they are not."""
    numbers: np.ndarray[Any, Any]
    """Rows of :func:`numbers_of`."""


def capturing() -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def check_capture(groups: list[Group], states: Mapping[Tensor, State]) -> None:
    """Raises ``RuntimeError`` if a step of these groups is to go into a CUDA graph and cannot."""
    if not capturing():
        return
    if not any(states.values()):
        check_made()
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "step() of a rotational optimizer goes into a CUDA graph with capturable=True alone: without it every "
            "replay would take this step's learning rate, angle and step count. Or capture forward and backward, and "
            "call step() after each replay"
        )
    for lr in [group["lr"] for group in groups if isinstance(group["lr"], Tensor) and not rate_on_device(group)]:
        raise RuntimeError(
            f"lr is a tensor on {lr.device}, which replays of a CUDA graph would not read again: move it to the device "
            "(group['lr'] = group['lr'].to('cuda')), also after a checkpoint has been loaded"
        )


def check_made() -> None:
    """Raises ``RuntimeError`` while a CUDA graph is captured: called where state or table are yet to be made."""
    if capturing():
        raise RuntimeError(
            "step() of a rotational optimizer is to go into a CUDA graph, and two steps have to be taken before that, "
            "with gradients for all parameters that have one now: they make the state"
        )


def check_captured(rest: list[list[Tensor]]) -> None:
    """Raises ``RuntimeError`` if the kernel has left parameters with a gradient while a CUDA graph is captured."""
    left = [tuple(parameter.shape) for parameters in rest for parameter in parameters if parameter.grad is not None]
    if left and capturing():
        raise RuntimeError(
            f"step() of a rotational optimizer cannot go into a CUDA graph: {len(left)} parameters, the first of shape "
            f"{left[0]}, are not stepped by the CUDA kernel (backend='fused'; docs/speed.md says what it has)"
        )


def rate_on_device(group: Group) -> bool:
    """Whether the kernel is to read the learning rate, which schedules change in place, by itself."""
    lr = group["lr"]
    return (
        bool(group["capturable"]) and isinstance(lr, Tensor) and lr.device.type == DEVICE and lr.dtype == torch.float32
    )


def takes(parameter: Tensor, group: Group, dims: tuple[int, ...]) -> bool:
    """Whether the kernel can step a parameter whose neurons span ``dims``, and is asked to."""
    if group["backend"] != "fused" or parameter.device.type != DEVICE or (dims and learns(group)):
        return False
    part = local(parameter.detach())
    layout = layout_of(parameter, dims)
    return (
        layout is not None
        and 1 in (layout[1], layout[3])
        and part.dtype in DTYPES
        and part.is_contiguous()
        and part.numel() > 0
        and (is_sharded(parameter) or type(parameter) in (Tensor, nn.Parameter))
        and type(part) is Tensor
        and not split_over(parameter, dims)
    )


def form_of(inner: Inner, group: Group) -> Form:
    """What a group decides of the code that steps its tensors."""
    kind = KINDS[type(inner)]
    if kind == "sgd" and group["momentum"]:
        kind = "nesterov" if group["nesterov"] else "momentum"
    forgetful = group["update_norm_decay"] < inner.momentum(group) ** 2
    return Form(kind, group["centering"] != "none", forgetful, group["rounding"], group["capturable"])


def numbers_of(
    inner: Inner, group: Group, target_rotation: Callable[[Group], float] | None, count: int, rotations: int
) -> tuple[float, ...]:
    """What a step computes with: columns from ``SIGN`` on of the kernel's table.

    Args:
        inner: the optimizer's.
        group: of the tensor.
        target_rotation: angle of a group, in radians; ``None`` for a tensor that does not rotate.
        count: number of this step.
        rotations: how many of them the running average of the update's size has seen, this one included.
    """
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    l2 = 0.0 if inner.decoupled else weight_decay
    beta1, new1, beta2, root_scale, eps = 0.0, 1.0, 0.0, 1.0, 0.0
    if isinstance(inner, SGD):
        beta1, new1 = group["momentum"], 1.0 if count == 1 else 1.0 - group["dampening"]
    else:
        beta1, beta2 = group["betas"]
        new1 = 1.0 - beta1
    if isinstance(inner, AdamW):
        correction = 1.0 - beta1**count
        root_scale, eps = correction / math.sqrt(1.0 - beta2**count), correction * group["eps"]
    new_size, relative, unbiased, angle, unit_angle = 0.0, 1.0, 1.0, 0.0, 0.0
    if target_rotation is not None:
        angle = target_rotation(group)
        unit_angle = target_rotation({**group, "lr": 1.0}) if group["capturable"] else 0.0
        relative = inner.relative_size_sq(group, count) if group["transient_correction"] else 1.0
        new_size = 1.0 - group["update_norm_decay"]
        unbiased = relative / (1.0 - group["update_norm_decay"] ** rotations)
    return (
        *(-1.0 if group["maximize"] else 1.0, l2 if target_rotation is None else 0.0, l2),
        *(beta1, new1, beta2, 1.0 - beta2, root_scale, eps),
        *(lr, 1.0 - lr * weight_decay if inner.decoupled else 1.0, angle),
        *(new_size, relative, unbiased, group["rotational_eps"]),
        *(group.get("eps", 0.0), weight_decay if inner.decoupled else 0.0),
        # Every rule for the angle goes with the learning rate, or with its root.
        *(unit_angle, float(group["rotation"] == "equilibrium")),
    )
