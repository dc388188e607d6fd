"""The rotational update straight from the formulas (paper, section 2 and algorithm 1): numpy, float64, no shared code.

A weight is a matrix whose rows are neurons; tests move axes so that it is. ``directions`` yields the inner optimizer's
update for each gradient, without learning rate and weight decay.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def adamw(grads: Iterable[Array], betas: tuple[float, float], eps: float = 1e-8) -> Iterator[Array]:
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        yield (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)


def rotate(
    p: Array, directions: Iterable[Array], angles: Iterable[float], centering: str, beta: float = 0.9, eps: float = 1e-8
) -> Array:
    """Algorithm 1 on every row of ``p``; ``angles`` are the target angles in radians, one per step."""

    def dot(a: Array, b: Array) -> Array:
        return (a * b).sum(axis=1, keepdims=True)

    if centering == "weights":
        p = p - p.mean(axis=1, keepdims=True)
    n = np.sqrt(dot(p, p))
    nu = np.zeros_like(n)
    for t, (u, angle) in enumerate(zip(directions, angles, strict=False), start=1):
        if centering != "none":
            u = u - u.mean(axis=1, keepdims=True)
        u = u - p * dot(u, p) / n**2
        nu = beta * nu + (1 - beta) * dot(u, u)
        p = p - angle * n * u / (np.sqrt(nu / (1 - beta**t)) + eps)
        p = p * n / np.sqrt(dot(p, p))
    return p


def adamw_angle(lr: float, weight_decay: float, betas: tuple[float, float]) -> float:
    return math.sqrt(2 * lr * weight_decay * (1 - betas[0]) / (1 + betas[0]))
