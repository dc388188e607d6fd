"""Lays steps of many tensors out for the Triton kernel, and launches it (needs the package ``triton``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton.language as tl

from hf_rotational.optim.kernels.cuda import Changing, Job, capturing
from hf_rotational.optim.kernels.triton_counts import count_steps
from hf_rotational.optim.kernels.triton_kernel import (
    COLUMNS,
    FIRST_TILE,
    GRAD,
    LR_AT,
    MOST_PARTS,
    PARTIALS,
    SEED,
    SIGN,
    Settings,
    Variant,
    rotational_step,
)
from hf_rotational.optim.precision import COMPENSATION

TILE = 2048
"""Entries a program goes over at a time; a neuron of up to twice as many is held as a whole."""
WIDTH = 32
"""Columns a program takes at a time."""
SHARED = 1 << 16
"""Entries from which on many programs work on one neuron."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
NEVER = 1 << 62
"""A first tile that never comes."""


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


class Launch:
    """A step of tensors on one device that share settings: one launch, and a second one if some of their neurons are
    shared by programs."""

    def __init__(self, device: torch.device, settings: Settings, counts: bool, jobs: Sequence[Job]) -> None:
        # Those whose neurons are shared come first: the second launch is of their tiles alone.
        work = sorted(((job, tiling_of(job)) for job in jobs), key=lambda pair: not pair[1].part)
        self._device, self._settings, self._counts = device, settings, counts
        self._variants = tuple(sorted({tiling.variant for _, tiling in work}))
        self._members = [job.row for job, _ in work]
        self._tiles, self._shared_tiles = 0, 0
        # Padded to a power of 2, of which few are compiled.
        self._rows = np.zeros((1 << (len(work) - 1).bit_length(), COLUMNS.value), np.int64)
        self._rows[len(work) :, FIRST_TILE.value] = NEVER
        for row, (job, tiling) in zip(self._rows, work, strict=False):
            variant = self._variants.index(tiling.variant)
            row[: GRAD.value] = (self._tiles, variant, tiling.neurons, tiling.span, tiling.part, *_addresses(job))
            self._tiles += tiling.tiles
            self._shared_tiles += tiling.tiles if tiling.part else 0
        self._table = torch.empty(self._rows.shape, dtype=torch.int64, device=device)
        self._partials = torch.empty(self._shared_tiles, PARTIALS.value, dtype=torch.float64, device=device)
        self._spare: torch.Tensor | None = None
        """Pinned memory for the next CUDA graph: while one is captured, none can be had."""
        self._replayed: list[torch.Tensor] = []
        """What graphs copy their tables from, at every replay."""

    def take(self, changing: Changing) -> None:
        """Takes the step."""
        rows, grads = self._rows[: len(self._members)], changing.grads[self._members]
        if not grads.any():
            return
        rows[:, GRAD.value] = grads
        rows[:, SEED.value] = changing.seeds[self._members]
        rows[:, LR_AT.value] = changing.rates[self._members]
        rows.view(np.float64)[:, SIGN.value :] = changing.numbers[self._members]
        with torch.cuda.device_of(self._table):  # type: ignore[no-untyped-call]
            self._table.copy_(self._source(), non_blocking=True)
            if self._counts:
                count_steps[(1,)](self._table, len(self._rows), num_warps=1, enable_fp_fusion=True)
            self._run(self._tiles, finishes=False)
            if self._shared_tiles:
                self._run(self._shared_tiles, finishes=True)

    def _source(self) -> torch.Tensor:
        """The table, where the device can copy it from while the host runs ahead."""
        table = torch.from_numpy(self._rows)
        if self._device.type != "cuda":
            return table
        if not capturing():
            if self._counts and self._spare is None:
                self._spare = torch.empty_like(table, pin_memory=True)
            # In memory of its own, which is not reused before it has been read.
            return table.pin_memory()
        if self._spare is None:
            raise RuntimeError("a second CUDA graph can be captured once step() has been called outside of one")
        self._replayed.append(self._spare.copy_(table))
        self._spare = None
        return self._replayed[-1]

    def _run(self, tiles: int, finishes: bool) -> None:
        arguments = (self._table, self._partials, len(self._rows), self._settings, self._variants, finishes)
        rotational_step[(tiles,)](*arguments, **OPTIONS)


def lay_out(jobs: Sequence[Job]) -> list[Launch]:
    """One launch for all jobs that share device, dtypes, settings, and who counts their steps."""
    alike: dict[tuple[torch.device, Settings, bool], list[Job]] = {}
    for job in jobs:
        alike.setdefault((job.member.parameter.device, settings_of(job), job.form.counts), []).append(job)
    return [Launch(*shared, together) for shared, together in alike.items()]


def settings_of(job: Job) -> Settings:
    """What a tensor must have in common with those it shares a launch with."""
    dtype = job.member.parameter.dtype
    rounding = "nearest" if dtype == torch.float32 else job.form.rounding
    return Settings(*job.form[:3], rounding, DTYPES[dtype], DTYPES[job.grad_dtype])


def tiling_of(job: Job) -> Tiling:
    """How a job's tensor is cut into tiles: by its shape, and by addresses for how it is loaded."""

    def variant(form: str, side_by_side: bool, neurons: int, span: int, contiguous: int) -> Variant:
        return Variant(form, side_by_side, neurons, span, job.aligned and contiguous % 8 == 0)

    matrices, rows, neurons, entries = job.member.layout
    if not job.member.dims:
        return Tiling(variant("plain", False, 1, TILE, entries), 1, entries, math.ceil(entries / TILE))
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


def _addresses(job: Job) -> list[int]:
    """Columns ``WEIGHT`` to ``ROTATION_STEP`` of the table; 0 for what the kernel does not read."""
    first = "exp_avg" if "exp_avg" in job.addresses else "momentum_buffer"
    names = ("weight", first, "exp_avg_sq", COMPENSATION, "norm", "update_norm_sq")
    counters = ("step", "rotation_step") if job.form.counts else ()
    return [job.addresses.get(name, 0) for name in (*names, *counters)] + [0] * (2 - len(counters))
