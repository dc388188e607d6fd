"""Angles between weight vectors, exact also where they are tiny."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rotational.optim.rotation import neuron_norm


def neuron_angles(before: Tensor, after: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The angle each neuron turned, in radians.

    ``2 asin(|u-v|/2)`` of the unit vectors: an arc cosine in float32 returns 0 below about 3e-4 radians, this is exact.

    Args:
        before, after: a weight at two times, same shape.
        dims: the dims one neuron spans.

    Returns:
        One angle per neuron, flattened, in float32 or wider. Neurons of norm 0 before or after are left out.
    """
    dtype = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(dtype), after.to(dtype)
    norms = neuron_norm(before, dims), neuron_norm(after, dims)
    chord = neuron_norm(before / norms[0] - after / norms[1], dims).flatten()
    alive = ((norms[0] > 0) & (norms[1] > 0)).flatten()
    return chord[alive].div(2).clamp(max=1).asin().mul(2)
