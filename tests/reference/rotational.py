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
        # Steps before the first update that is not 0 do not count in its average.
        nu = np.where(nu == 0, (1 - beta**t) * dot(u, u), beta * nu + (1 - beta) * dot(u, u))
        p = p - angle * n * u / (np.sqrt(nu / (1 - beta**t)) + eps)
        p = p * n / np.sqrt(dot(p, p))
    return p


def rotate_and_learn(
    w: Array,
    grads: Iterable[Array],
    directions: Callable[[], Direction],
    angles: Iterable[float],
    lrs: Iterable[float],
    decay: float = 0.0,
    l2: float = 0.0,
    free_mean: bool = False,
) -> Array:
    """Neurons ``g v [+ m 1]`` in a module: ``v`` of norm 1 rotates; ``g`` [and ``m``] take the plain step.

    ``directions`` makes an inner; ``decay`` is the decoupled weight decay of ``g`` and ``m``, ``l2`` the other kind.
    """
    turning, gaining, meaning = directions(), directions(), directions()
    m = w.mean(axis=1, keepdims=True) if free_mean else np.zeros((len(w), 1))
    g = np.sqrt(((w - m) ** 2).sum(axis=1, keepdims=True))
    v = (w - m) / g
    n, nu = np.ones_like(g), np.zeros_like(g)
    for t, (grad, angle, lr) in enumerate(zip(grads, angles, lrs, strict=True), start=1):
        u = turning(g * grad, v)
        if free_mean:
            u = u - u.mean(axis=1, keepdims=True)
        step_g = gaining((grad * v).sum(axis=1, keepdims=True) + l2 * g, g)
        step_m = meaning(grad.sum(axis=1, keepdims=True) + l2 * m, m) if free_mean else 0.0
        u = u - v * (u * v).sum(axis=1, keepdims=True)
        size_sq = (u * u).sum(axis=1, keepdims=True)
        nu = np.where(nu == 0, (1 - 0.9**t) * size_sq, 0.9 * nu + 0.1 * size_sq)
        v = v - angle * n * u / (np.sqrt(nu / (1 - 0.9**t)) + 1e-8)
        v = v / np.sqrt((v * v).sum(axis=1, keepdims=True))
        g = g - lr * (step_g + decay * g)
        m = m - lr * (step_m + decay * m)
    return g * v + m


def adam_angle(lr: float, wd: float, betas: tuple[float, float]) -> float:
    return math.sqrt(2 * lr * wd * (1 - betas[0]) / (1 + betas[0]))


def sgd_angle(lr: float, wd: float, momentum: float) -> float:
    return math.sqrt(2 * lr * wd / (1 + momentum))


def lion_angle(lr: float, wd: float, betas: tuple[float, float]) -> float:
    return math.sqrt(math.pi * lr * wd * ((1 - betas[0]) ** 2 + betas[0] ** 2 * (1 - betas[1]) / (1 + betas[1])))


def match_angle(lr: float, momentum: float, weights: Iterable[Array]) -> float:
    rms = np.median([np.sqrt((w**2).mean()) for w in weights])
    return 2 * math.sqrt((1 - momentum) / (1 + momentum)) * lr / rms
