"""The random walk that the closed forms describe: a plain optimizer on gradients without a signal, in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

Step: TypeAlias = Callable[[Array, Array], Array]
"""From weights and their gradient to the weights after one step of the optimizer."""


@dataclass(frozen=True)
class Walk:
    """What every neuron did: a row per step, a column per neuron."""

    norm: Array
    """Norm of the neuron's weight vector after the step."""
    rotation: Array
    """Angle that the neuron turned in the step, in radians."""


def simulate(
    optim: str,
    *,
    lr: float,
    weight_decay: float,
    steps: int,
    fan_in: int = 128,
    neurons: int = 64,
    start_norm: float = 1.0,
    scale_invariant: bool = True,
    grad_std: float | Array = 1.0,
    seed: int = 0,
    **hyperparameters: Any,
) -> Walk:
    """Walks neurons with a plain optimizer, weight decay included; gradients are normal, independent at every step.

    Example::

        walk = simulate("adamw", lr=1e-2, weight_decay=0.1, steps=4000)
        predicted = adamw(lr=1e-2, weight_decay=0.1, fan_in=128)
        print(walk.norm[2000:].mean() / predicted.norm, walk.rotation[2000:].mean() / predicted.rotation)

    Args:
        optim: ``"adamw"``, ``"adam_l2"``, ``"sgdm"`` or ``"lion"``.
        lr: learning rate.
        weight_decay: decoupled weight decay, or L2 regularization for ``adam_l2`` and ``sgdm``.
        steps: how many.
        fan_in: entries in a neuron.
        neurons: how many walk, each for itself.
        start_norm: norm of every neuron before the first step; its direction is random.
        scale_invariant: gradients as behind a normalization: orthogonal to the weight and in inverse proportion to its
            norm. Otherwise they do not depend on the weight.
        grad_std: standard deviation of the gradient's entries (with ``scale_invariant``, at unit norm): a number, or
            one for each entry of the neuron.
        seed: decides directions and gradients.
        **hyperparameters: ``betas`` (and ``eps`` for ``adamw`` and ``adam_l2``), or ``momentum`` for ``sgdm``.

    Raises:
        ValueError: for an unknown optimizer, or an argument that has to be positive and is not.
    """
    if optim not in STEPS:
        raise ValueError(f"Unknown optim: {optim!r} (valid: {', '.join(STEPS)})")
    for name, value in {"steps": steps, "fan_in": fan_in, "neurons": neurons, "start_norm": start_norm}.items():
        if not value > 0:
            raise ValueError(f"Invalid {name}: {value} (must be > 0)")
    step = STEPS[optim](lr, weight_decay, **hyperparameters)
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((neurons, fan_in))
    weights *= start_norm / _norm(weights)
    norms, rotations = np.empty((steps, neurons)), np.empty((steps, neurons))
    norm = _norm(weights)
    for index in range(steps):
        gradients = grad_std * rng.standard_normal(weights.shape)
        axes = weights / norm
        if scale_invariant:
            gradients = (gradients - axes * _products(gradients, axes)) / norm
        weights = step(weights, gradients)
        norm = _norm(weights)
        norms[index] = norm[:, 0]
        # The arc cosine of the scalar product would lose small angles to rounding.
        rotations[index] = 2 * np.arcsin(np.minimum(_norm(weights / norm - axes)[:, 0] / 2, 1))
    return Walk(norms, rotations)


def _adamw(lr: float, weight_decay: float, **hyperparameters: Any) -> Step:
    direction = _Adam(**hyperparameters)
    return lambda weights, gradients: (1 - lr * weight_decay) * weights - lr * direction(gradients)


def _adam_l2(lr: float, weight_decay: float, **hyperparameters: Any) -> Step:
    direction = _Adam(**hyperparameters)
    return lambda weights, gradients: weights - lr * direction(gradients + weight_decay * weights)


def _sgdm(lr: float, weight_decay: float, momentum: float = 0.0) -> Step:
    total: Array | float = 0.0

    def step(weights: Array, gradients: Array) -> Array:
        nonlocal total
        total = momentum * total + gradients + weight_decay * weights
        return weights - lr * total

    return step


def _lion(lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99)) -> Step:
    mean: Array | float = 0.0

    def step(weights: Array, gradients: Array) -> Array:
        nonlocal mean
        sign = np.sign(betas[0] * mean + (1 - betas[0]) * gradients)
        mean = betas[1] * mean + (1 - betas[1]) * gradients
        return (1 - lr * weight_decay) * weights - lr * sign

    return step


class _Adam:
    """The mean gradient over the root of the mean squared gradient, both bias corrected."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.steps = 0
        self.mean: Array | float = 0.0
        self.mean_sq: Array | float = 0.0

    def __call__(self, gradients: Array) -> Array:
        beta1, beta2 = self.betas
        self.steps += 1
        self.mean = beta1 * self.mean + (1 - beta1) * gradients
        self.mean_sq = beta2 * self.mean_sq + (1 - beta2) * gradients**2
        corrected_sq = self.mean_sq / (1 - beta2**self.steps)
        return self.mean / (1 - beta1**self.steps) / (np.sqrt(corrected_sq) + self.eps)


STEPS: dict[str, Callable[..., Step]] = {"adamw": _adamw, "adam_l2": _adam_l2, "sgdm": _sgdm, "lion": _lion}


def _norm(rows: Array) -> Array:
    return np.sqrt(_products(rows, rows))


def _products(left: Array, right: Array) -> Array:
    """Scalar product of every two rows, as a column."""
    column: Array = np.einsum("ij,ij->i", left, right)[:, None]
    return column
