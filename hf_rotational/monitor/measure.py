"""What one step did to every neuron: angles that are exact where they are tiny, relative updates, norms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rotational.optim.rotation import neuron_norm


@dataclass(frozen=True)
class NeuronStep:
    """One value per neuron of a weight, flattened, in float32 or wider.

    Neurons without a direction before or after the step, because their norm is 0 or not finite, are left out.
    """

    angle: Tensor
    """How far the neuron turned, in radians."""
    relative_update: Tensor
    """Size of the step over the norm before it."""
    norm: Tensor
    """Norm after the step."""


def neuron_step(before: Tensor, after: Tensor, dims: tuple[int, ...]) -> NeuronStep:
    """Compares a weight with a copy of itself from before a step.

    The angle is ``2 asin(|u-v|/2)`` of the unit vectors: an arc cosine in float32 returns 0 below about 3e-4 radians,
    this is exact.

    Args:
        before, after: the weight at the two times, same shape; sharded ones (DTensor) are measured whole.
        dims: the dims one neuron spans.
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(dtype)
    start, end = neuron_norm(before, dims), neuron_norm(after, dims)
    chord = neuron_norm(after / end - before / start, dims)
    step = neuron_norm(after - before, dims)
    start, end, chord, step = (_whole(tensor).flatten() for tensor in (start, end, chord, step))
    alive = (start > 0) & (end > 0) & (start + end).isfinite()
    return NeuronStep(
        angle=chord[alive].div(2).clamp(max=1).asin().mul(2),
        relative_update=step[alive] / start[alive],
        norm=end[alive],
    )


def neuron_angles(before: Tensor, after: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The angle each neuron turned, in radians; see :func:`neuron_step`."""
    return neuron_step(before, after, dims).angle


def _whole(tensor: Tensor) -> Tensor:
    """A per-neuron statistic with the parts that other ranks hold."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
