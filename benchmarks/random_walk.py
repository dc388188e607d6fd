"""Random walks: training without a signal, which is what the closed forms of rotational equilibrium describe.

Neurons are the rows of one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_rotational.monitor.measure import neuron_angles
from hf_rotational.optim.rotation import neuron_norm

Gradient = Callable[[Tensor], Tensor]
"""From the weight to its next gradient, in float32."""


def independent(seed: int = 0) -> Gradient:
    """Standard normal gradients that do not depend on the weight."""
    generator = torch.Generator().manual_seed(seed)
    return lambda weight: torch.randn(weight.shape, generator=generator)


def constant(seed: int = 0) -> Gradient:
    """One normal gradient, the same at every step: as far from independent as can be."""
    return lambda weight: independent(seed)(weight)


def scale_invariant(seed: int = 0, scale: Tensor | float = 1.0) -> Gradient:
    """Gradients of neurons that a normalization follows: orthogonal to the weight, and inverse to its norm.

    ``scale`` is the standard deviation of an entry at unit norm, for all or broadcast over the weight.
    """
    draw = independent(seed)

    def gradient(weight: Tensor) -> Tensor:
        norm = neuron_norm(weight, (1,))
        axis, at_unit_norm = weight / norm, draw(weight).mul(scale)
        tangent = at_unit_norm - axis * (at_unit_norm * axis).sum(1, keepdim=True)
        return tangent / norm

    return gradient


def walk(optimizer: Optimizer, weight: Tensor, gradient: Gradient, steps: int) -> Iterator[Tensor]:
    """Takes the steps. Gives, after each, the angle that every neuron has turned in it, in radians."""
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = gradient(before).to(weight.dtype)
        optimizer.step()
        yield neuron_angles(before, weight.detach(), (1,))
