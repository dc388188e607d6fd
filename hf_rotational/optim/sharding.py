"""Weights whose entries lie on several ranks: DTensors, as FSDP2 (``fully_shard``) and tensor parallelism make them.

A step works on what its rank holds. Neurons that are whole on a rank need nothing of the others. Where a neuron is
spread over ranks (GPT-2's columns, cut by rows; a tensor that is one neuron), sums over its entries must be completed.
Code that needs such sums is a generator: it yields the sums over the entries that are here, and is sent those over the
whole neuron. :func:`complete` runs many of them side by side, so that a step takes as many collectives as one tensor
has sums, however many tensors there are.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
Sums = Generator[Tensor, Tensor, T]
"""Yields sums over the entries on this rank, is sent those over all ranks, and returns ``T``."""

PIECES = {
    "_fsdp_flattened": "FSDP version 1",
    "ds_shape": "DeepSpeed ZeRO-3",
    "tensor_model_parallel": "tensor parallelism without DTensors (DeepSpeed AutoTP, Megatron)",
}
"""Marks of parameters that hold an unknown part of a tensor, or of several: attribute to who has made them so."""
REMEDY = "Use DDP or FSDP version 2 (accelerate: fsdp_version: 2), whose shards keep their shape"


def check_whole(parameters: Iterable[Tensor]) -> None:
    """Raises ``ValueError`` for parameters that were flattened or cut up, so that neurons cannot be told in them."""
    for parameter in parameters:
        for mark, by in PIECES.items():
            if getattr(parameter, mark, None):
                raise ValueError(
                    f"Invalid parameter of shape {tuple(parameter.shape)}: {by} has made it, and neurons cannot be "
                    f"told in it. {REMEDY}"
                )


def stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors of one shape as one, along a new first dim; a single one is not copied."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, told without importing what defines them."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of a tensor that belongs to the parameter's part on this rank."""
    if not is_sharded(tensor):
        return tensor
    if is_sharded(parameter) and tensor.placements != parameter.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(tensor)


def split_over(parameter: Tensor, dims: tuple[int, ...]) -> tuple[ProcessGroup, ...]:
    """The groups of ranks that hold parts of one neuron, which spans ``dims``; empty if neurons are whole here.

    Raises:
        ValueError: for a parameter whose ranks hold terms of a sum (a ``Partial`` placement).
    """
    if not is_sharded(parameter):
        return ()
    placements: tuple[Any, ...] = parameter.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"Invalid placements: {placements} (must be Shard or Replicate)")
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return tuple(
        mesh.get_group(place)
        for place, placement in enumerate(placements)
        if getattr(placement, "dim", None) in dims and mesh.size(place) > 1
    )


def shard_number(parameter: Tensor) -> int:
    """Which part of a parameter this rank holds: the same on ranks that hold the same part."""
    number = 0
    if is_sharded(parameter):
        mesh = parameter.device_mesh  # type: ignore[attr-defined]
        for placement, coordinate, size in zip(parameter.placements, mesh.get_coordinate(), mesh.shape, strict=True):  # type: ignore[attr-defined]
            if not placement.is_replicate():
                number = number * size + coordinate
    return number


def placed(part: Tensor, parameter: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A DTensor of what ranks hold of a statistic per neuron (``dims``: what a neuron spans) or, without ``dims``, of a
    tensor shaped like the parameter."""
    from torch.distributed.tensor import DTensor, Replicate

    shape = torch.Size(1 if dim in dims else size for dim, size in enumerate(parameter.shape))
    placements = [
        Replicate() if getattr(placement, "dim", None) in dims else placement
        for placement in parameter.placements  # type: ignore[attr-defined]
    ]
    # Shape and stride are given because ranks may hold different numbers of rows.
    stride = torch.empty(shape, device="meta").stride()
    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


def complete(runs: Iterable[tuple[Sums[Any], tuple[ProcessGroup, ...]]]) -> None:
    """Runs generators of sums to their ends: one after the other where neurons are whole, else side by side."""
    spread: list[tuple[Sums[Any], tuple[ProcessGroup, ...]]] = []
    for sums, groups in runs:
        if groups:
            spread.append((sums, groups))
        else:
            alone(sums)
    waiting = [(sums, groups, next(sums, None)) for sums, groups in spread]
    while waiting := [(sums, groups, part) for sums, groups, part in waiting if part is not None]:
        totals = _totals([(part, groups) for _, groups, part in waiting])
        waiting = [(sums, groups, send(sums, total)) for (sums, groups, _), total in zip(waiting, totals, strict=True)]


def alone(sums: Sums[T]) -> T:
    """Runs a generator to its end where the entries that are here are all there are; returns what it returns."""
    try:
        part = next(sums)
        while True:
            part = sums.send(part)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def send(sums: Sums[Any], total: Tensor) -> Tensor | None:
    """Goes on with the total of what a generator has yielded; returns what it yields next, ``None`` at its end."""
    try:
        return sums.send(total)
    except StopIteration:
        return None


def _totals(parts: list[tuple[Tensor, tuple[ProcessGroup, ...]]]) -> list[Tensor]:
    """Adds up parts over their groups: one collective for all that share groups, dtype and device."""
    buckets: dict[Any, list[int]] = {}
    for place, (part, groups) in enumerate(parts):
        buckets.setdefault((groups, part.dtype, part.device), []).append(place)
    totals: list[Tensor] = [part for part, _ in parts]
    for (groups, _, _), places in buckets.items():
        joined = torch.cat([parts[place][0].reshape(-1) for place in places])
        for group in groups:
            torch.distributed.all_reduce(joined, group=group)
        pieces = torch.split(joined, [parts[place][0].numel() for place in places])
        for place, piece in zip(places, pieces, strict=True):
            totals[place] = piece.view_as(parts[place][0])
    return totals
