"""The rotational update straight from the formulas (paper, section 2 and algorithm 1): numpy, float64, no shared code.

A weight is a matrix whose rows are neurons; tests move axes so that it is. A ``Direction`` is the inner optimizer's
update for a gradient and the weights it was taken at, without learning rate and weight decay.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Direction = Callable[[Array, Array], Array]


def adam(betas: tuple[float, float], eps: float = 1e-8, l2: float = 0.0) -> Direction:
    """AdamW's direction; with ``l2``, Adam's whose second moment alone sees the L2 term."""
    m = v = 0.0
    t = 0

    def direction(g: Array, p: Array) -> Array:
        nonlocal m, v, t
        t += 1
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * (g + l2 * p) ** 2
        return (m / (1 - betas[0] ** t)) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)

    return direction


def sgd(momentum: float, dampening: float = 0.0, nesterov: bool = False) -> Direction:
    buffer: Array | None = None

    def direction(g: Array, p: Array) -> Array:
        nonlocal buffer
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        return g + momentum * buffer if nesterov else buffer

    return direction


def lion(betas: tuple[float, float]) -> Direction:
    m = 0.0

    def direction(g: Array, p: Array) -> Array:
        nonlocal m
        u = np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
        return u

    return direction


def rotate(
    p: Array,
    grads: Iterable[Array],
    direction: Direction,
    angles: Iterable[float],
    centering: str = "none",
    beta: float = 0.9,
    eps: float = 1e-8,
) -> Array:
    """Algorithm 1 on every row of ``p``; ``angles`` are the target angles in radians, one per step."""

    def dot(a: Array, b: Array) -> Array:
        return (a * b).sum(axis=1, keepdims=True)

    if centering == "weights":
        p = p - p.mean(axis=1, keepdims=True)
    n = np.sqrt(dot(p, p))
    nu = np.zeros_like(n)
    for t, (g, angle) in enumerate(zip(grads, angles, strict=True), start=1):
        u = direction(g, p)
        if centering != "none":
            u = u - u.mean(axis=1, keepdims=True)
        u = u - p * dot(u, p) / n**2
        nu = beta * nu + (1 - beta) * dot(u, u)
        p = p - angle * n * u / (np.sqrt(nu / (1 - beta**t)) + eps)
        p = p * n / np.sqrt(dot(p, p))
    return p


def adam_angle(lr: float, wd: float, betas: tuple[float, float]) -> float:
    return math.sqrt(2 * lr * wd * (1 - betas[0]) / (1 + betas[0]))


def sgd_angle(lr: float, wd: float, momentum: float) -> float:
    return math.sqrt(2 * lr * wd / (1 + momentum))


def lion_angle(lr: float, wd: float, betas: tuple[float, float]) -> float:
    return math.sqrt(math.pi * lr * wd * ((1 - betas[0]) ** 2 + betas[0] ** 2 * (1 - betas[1]) / (1 + betas[1])))


def match_angle(lr: float, momentum: float, weights: Iterable[Array]) -> float:
    rms = np.median([np.sqrt((w**2).mean()) for w in weights])
    return 2 * math.sqrt((1 - momentum) / (1 + momentum)) * lr / rms
