"""Blocks: the parts of tensors that a step on a CPU takes one after the other, small enough to stay in its cache.

A step is some thirty operations on weights of any size. Taken on whole tensors, each of them fetches its operands from
memory and leaves a temporary of their size. Taken block by block, memory is read once and temporaries are as large as
a block. The same lines step a block, a tensor, or a stack of tensors.

Neurons that lie in one piece stay whole. Those that do not (GPT-2's are columns) would make blocks of short pieces of
memory, which come slowly. They are cut into blocks themselves, and the blocks of as many as a panel holds are stepped
side by side: like neurons that are spread over ranks, whose sums must be completed (sharding.py).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_rotational.optim.inner import State
from hf_rotational.optim.sharding import Sums, send

BLOCK = 1 << 19
"""Entries of a block: 2 MB in float32, of which an operation needs two or three. Smaller ones cost more operations."""
PANEL = 1 << 22
"""Entries of the blocks that are stepped side by side. Their updates are the largest temporary, 16 MB in float32."""

Cut = tuple[slice, ...]
"""Where a block lies in a tensor; ``()`` is the whole tensor."""


class Part(NamedTuple):
    """What a step works on of a tensor: all of it that is on this rank, or a block."""

    stored: Tensor
    """The weights, in the parameter's dtype."""
    grad: Tensor
    state: State
    draws: torch.Generator | None
    """What stochastic rounding draws from."""

    def at(self, cut: Cut, dims: tuple[int, ...], *, first: bool) -> Part:
        """A block, sharing its memory.

        Blocks of the same neurons each have their statistics, which come out alike; the first one's are the tensor's.

        Args:
            cut: where it lies.
            dims: the dims one neuron spans.
            first: whether it is the first block of its neurons.
        """
        if not cut:
            return self
        neurons = tuple(slice(None) if dim in dims else piece for dim, piece in enumerate(cut))
        state: State = {}
        for name, value in self.state.items():
            if isinstance(value, Tensor) and value.shape == self.stored.shape:
                value = value[cut]
            elif isinstance(value, Tensor) and value.ndim == len(cut):
                value = value[neurons] if first else value[neurons].clone()
            state[name] = value
        return Part(self.stored[cut], self.grad[cut], state, self.draws)


def blocks(tensors: list[Tensor], dims: tuple[int, ...]) -> Iterator[tuple[slice, list[Cut]]]:
    """Cuts tensors into blocks: which of the tensors they are of, and where in them those lie that share neurons.

    Blocks are of one tensor, or of as many small ones as one can hold. On accelerators, where an operation on all
    tensors is one launch, and where a compiler sees to memory, all tensors are one block.

    Args:
        tensors: of one dtype and device and, unless ``dims`` is empty, of one shape.
        dims: the dims one neuron spans.
    """
    if tensors[0].device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(None), [()]
        return
    start, total = 0, 0
    for place, tensor in enumerate(tensors):
        size = tensor.numel()
        if place > start and total + size > BLOCK:
            yield slice(start, place), [()]
            start, total = place, 0
        total += size
        if size > BLOCK:
            for cuts in panels(tensor.shape, dims, BLOCK, PANEL):
                yield slice(place, place + 1), cuts
            start, total = place + 1, 0
    if start < len(tensors):
        yield slice(start, None), [()]


@functools.lru_cache(maxsize=1024)
def panels(shape: tuple[int, ...], dims: tuple[int, ...], block: int, panel: int) -> list[list[Cut]]:
    """Cuts a tensor into panels of whole neurons, which span ``dims``, and each panel into blocks.

    Args:
        shape: of the tensor.
        dims: the dims one neuron spans.
        block: the most entries of a block, where that can be had.
        panel: of a panel.
    """
    cuts, size = [[slice(None)]] * len(shape), math.prod(shape)
    for dim, length in enumerate(shape):
        if dim not in dims and size > block:
            in_one_piece = all(outer not in dims for outer in range(dim))
            cuts[dim], size = _cut(length, size, block if in_one_piece else panel)
    panels = list(itertools.product(*cuts))
    for dim in dims:
        if size > block:
            cuts[dim], size = _cut(shape[dim], size, block)
    return [
        list(itertools.product(*(cuts[dim] if dim in dims else [piece] for dim, piece in enumerate(neurons))))
        for neurons in panels
    ]


def _cut(length: int, size: int, most: int) -> tuple[list[slice], int]:
    """Cuts a dim until a tensor of ``size`` entries has ``most``, if it can; returns the parts and what remains."""
    count = math.ceil(length / max(most * length // size, 1))
    # As even as can be: a last part of a few entries would cost as many operations as the others.
    parts = [slice(length * part // count, length * (part + 1) // count) for part in range(count)]
    return parts, size // length * math.ceil(length / count)


def side_by_side(runs: list[Sums[None]]) -> Sums[None]:
    """Runs generators of sums, each over a part of the same neurons, as one over them all."""
    if len(runs) == 1:
        yield from runs[0]
        return
    sums = [next(run, None) for run in runs]
    while sums[0] is not None:
        total = yield torch.stack(sums).sum(0)  # type: ignore[arg-type]
        sums = [send(run, total) for run in runs]
