"""Lays out one step of many tensors for the Triton kernel, and launches it (needs the package ``triton``).

What changes from step to step (addresses of gradients, learning rate, angle, bias corrections) goes to the device in
one table, a small copy that nothing waits for. So schedules neither recompile nor synchronize, and a captured CUDA
graph of the launches would stay right if the table were filled in anew, at its address, before every replay.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hf_rotational.optim.inner import SGD, Adam, AdamW, Inner, Lion, State, count_steps
from hf_rotational.optim.kernels.cpu import layout_of
from hf_rotational.optim.kernels.triton_kernel import COLUMNS, MOST_PARTS, PARTIALS, Settings, Variant, rotational_step
from hf_rotational.optim.precision import COMPENSATION

if TYPE_CHECKING:
    from hf_rotational.optim.step import Step

TILE = 2048
"""Entries a program goes over at a time; a neuron of up to twice as many is held as a whole."""
WIDTH = 32
"""Columns a program takes at a time."""
SHARED = 1 << 16
"""Entries from which on many programs work on one neuron."""
WARPS = 8
KINDS: dict[type[Inner], str] = {AdamW: "adam", Adam: "adam", SGD: "sgd", Lion: "lion"}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROW = struct.Struct("<14q16d")
"""A row of the table: the columns that ``triton_kernel`` names."""
NEVER = ROW.pack(1 << 62, *[0] * 13, *[0.0] * 16)
"""A row whose first tile never comes."""


class Job(NamedTuple):
    """One tensor's step, on what of it is on this rank: whole neurons, contiguous in memory."""

    step: Step
    weight: Tensor
    grad: Tensor
    state: State
    """With moments and, if the tensor rotates, with what is held of its neurons."""
    place: int
    """In its optimizer: it seeds stochastic rounding."""


class Tiling(NamedTuple):
    """How a tensor is cut into tiles."""

    variant: Variant
    neurons: int
    """In each matrix if they lie side by side, otherwise in all."""
    span: int
    """Entries of a neuron."""
    tiles: int
    part: int = 0
    """Entries of a neuron that one program has, if it is shared."""


def take(jobs: Iterable[Job]) -> None:
    """Takes the step of every job, and counts it: one launch for all that share dtypes and settings, and a second one
    if some of their neurons are shared by programs."""
    alike: dict[tuple[torch.device, Settings], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.weight.device, settings_of(job)), []).append(job)
    for (_, settings), together in alike.items():
        count_steps([job.state for job in together])
        with torch.cuda.device_of(together[0].weight):  # type: ignore[no-untyped-call]
            _launch(settings, together)


def settings_of(job: Job) -> Settings:
    """What a tensor must have in common with those it shares a launch with."""
    inner, group = job.step.inner, job.step.group
    kind = KINDS[type(inner)]
    if kind == "sgd" and group["momentum"]:
        kind = "nesterov" if group["nesterov"] else "momentum"
    return Settings(
        kind,
        centers=group["centering"] != "none",
        forgetful=group["update_norm_decay"] < inner.momentum(group) ** 2,
        rounding="nearest" if job.weight.dtype == torch.float32 else group["rounding"],
        dtype=DTYPES[job.weight.dtype],
        grad_dtype=DTYPES[job.grad.dtype],
    )


def tiling_of(job: Job) -> Tiling:
    """How a job's tensor is cut into tiles: by its shape, and by addresses for how it is loaded."""
    tensors = [job.weight, job.grad, *(value for value in job.state.values() if isinstance(value, Tensor))]
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors if tensor.shape == job.weight.shape)

    def variant(form: str, side_by_side: bool, neurons: int, span: int, contiguous: int) -> Variant:
        return Variant(form, side_by_side, neurons, span, aligned and contiguous % 8 == 0)

    if not job.step.dims:
        size = job.weight.numel()
        return Tiling(variant("plain", False, 1, TILE, size), 1, size, math.ceil(size / TILE))
    layout = layout_of(job.weight, job.step.dims)
    assert layout is not None
    matrices, rows, neurons, entries = layout
    if rows > 1:
        form = "held" if rows <= TILE // WIDTH else "walked"
        tiles = matrices * math.ceil(neurons / WIDTH)
        return Tiling(variant(form, True, WIDTH, TILE // WIDTH, neurons), neurons, rows, tiles)
    if entries <= 2 * TILE:
        span = max(32, 1 << (entries - 1).bit_length())
        at_once = max(1, TILE // span)
        return Tiling(variant("held", False, at_once, span, entries), neurons, entries, math.ceil(neurons / at_once))
    if entries <= SHARED:
        return Tiling(variant("walked", False, 1, TILE, entries), neurons, entries, neurons)
    part = TILE * max(8, math.ceil(entries / TILE / MOST_PARTS.value))
    tiles = neurons * math.ceil(entries / part)
    return Tiling(variant("shared", False, 1, TILE, entries), neurons, entries, tiles, part)


def numbers_of(job: Job) -> tuple[float, ...]:
    """What a step computes with, this step's count included: columns ``SIGN`` to ``ROTATIONAL_EPS`` of the table."""
    inner, group, state = job.step.inner, job.step.group, job.state
    lr, weight_decay, count = float(group["lr"]), float(group["weight_decay"]), int(state["step"])
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
    new_size, relative, unbiased = 0.0, 1.0, 1.0
    if job.step.dims:
        relative = inner.relative_size_sq(group, count) if group["transient_correction"] else 1.0
        new_size = 1.0 - group["update_norm_decay"]
        unbiased = relative / (1.0 - group["update_norm_decay"] ** state["rotation_step"])
    return (
        *(-1.0 if group["maximize"] else 1.0, 0.0 if job.step.dims else l2, l2),
        *(beta1, new1, beta2, 1.0 - beta2, root_scale, eps),
        *(lr, 1.0 - lr * weight_decay if inner.decoupled else 1.0, job.step.angle),
        *(new_size, relative, unbiased, group["rotational_eps"]),
    )


def _launch(settings: Settings, jobs: Sequence[Job]) -> None:
    for job in jobs:
        _count(job, settings.rounding)
    tiled = [(job, tiling_of(job)) for job in jobs]
    shared = [(job, tiling) for job, tiling in tiled if tiling.part]
    device = jobs[0].weight.device
    parts = sum(tiling.tiles for _, tiling in shared)
    partials = torch.empty(parts, PARTIALS.value, dtype=torch.float64, device=device)
    for work in filter(None, (tiled, shared)):
        variants = tuple(sorted({tiling.variant for _, tiling in work}))
        table, tiles = _table(work, variants)
        rows = len(table) // COLUMNS.value
        table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
        rotational_step[(tiles,)](table, partials, rows, settings, variants, work is shared, num_warps=WARPS)


def _count(job: Job, rounding: str) -> None:
    """Counts a step of what only rotational optimizers keep, and makes room for what Kahan rounding cuts off."""
    if job.step.dims:
        job.state["rotation_step"] += 1
    if rounding == "kahan" and COMPENSATION not in job.state:
        job.state[COMPENSATION] = torch.zeros_like(job.weight)
    if rounding == "stochastic" and float(job.step.group["lr"]) != 0:
        job.state["roundings"] = job.state.get("roundings", 0) + 1


def _table(work: Sequence[tuple[Job, Tiling]], variants: tuple[Variant, ...]) -> tuple[Tensor, int]:
    """The table for a launch, padded to a power of 2, and how many tiles its tensors have."""
    packed, tiles, parts = [], 0, 0
    for job, tiling in work:
        first, second = (*job.step.inner.buffers(job.step.group), "", "")[:2]
        kept = [job.state.get(name) for name in (first, second, COMPENSATION, "norm", "update_norm_sq")]
        packed.append(
            ROW.pack(
                *(tiles, variants.index(tiling.variant), tiling.neurons, tiling.span, tiling.part, parts),
                (job.place << 32) + job.state.get("roundings", 0),
                *(0 if tensor is None else tensor.data_ptr() for tensor in (job.weight, job.grad, *kept)),
                *numbers_of(job),
            )
        )
        tiles += tiling.tiles
        parts += tiling.tiles if tiling.part else 0
    packed += [NEVER] * ((1 << (len(packed) - 1).bit_length()) - len(packed))
    return torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.int64), tiles
