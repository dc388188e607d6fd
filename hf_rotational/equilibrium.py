"""Rotational equilibrium in closed form: what weight decay makes every neuron do, for each inner optimizer.

Gradient steps push the norm of a neuron's weight vector up, weight decay pulls it down. The two settle at a steady
norm and a steady expected angle per step (paper, section 3). Symbols: ``C`` entries in the neuron (``fan_in``),
learning rate ``lr``, weight decay ``weight_decay``. Every formula assumes ``lr * weight_decay << 1`` and gradients
that are independent from step to step; it holds for neurons whose scale does not matter (a normalization follows).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Equilibrium:
    """What a neuron settles to. A field is ``None`` where the arguments given do not determine it."""

    norm: float | None
    """Norm of the neuron's weight vector, in units of the weights."""
    update_rms: float | None
    """Root mean square norm of one step's update of the neuron, without weight decay, in units of the weights."""
    rotation: float | None
    """Expected angle the neuron turns per step, in radians."""
    half_life: float | None
    """Steps in which the distance of the squared norm (SGDM: of its square) from equilibrium halves."""


def adamw(
    *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), fan_in: int | None = None
) -> Equilibrium:
    """AdamW (decoupled weight decay).

    ``rotation = sqrt(2 lr wd (1-b1)/(1+b1))``, ``update_rms = lr sqrt(C (1-b1)/(1+b1))``,
    ``norm = sqrt(lr C/(2 wd))``, ``half_life = ln 2/(2 lr wd)`` (paper, section 3.2; half-life derived from it).

    Args:
        lr: learning rate.
        weight_decay: decoupled weight decay; at 0 there is no equilibrium: rotation 0, norm and half-life infinite.
        betas: AdamW's betas; the second does not enter.
        fan_in: entries in the neuron; without it ``norm`` and ``update_rms`` are ``None``.
    """
    smoothing = (1 - betas[0]) / (1 + betas[0])
    return Equilibrium(
        norm=None if fan_in is None else _sqrt_ratio(lr * fan_in, 2 * weight_decay),
        update_rms=None if fan_in is None else lr * math.sqrt(fan_in * smoothing),
        rotation=math.sqrt(2 * lr * weight_decay * smoothing),
        half_life=_ratio(math.log(2), 2 * lr * weight_decay),
    )


def adam_l2(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    fan_in: int | None = None,
    grad_l1: float | None = None,
) -> Equilibrium:
    """Adam with L2 regularization: there the angle depends on the gradient, so neurons are not balanced (section 3.3).

    ``norm = (lr/(2 wd) <1, sqrt(E g~^2)>)^(1/3)``, ``update_rms`` as AdamW's, ``rotation = update_rms / norm``.

    Args:
        grad_l1: ``<1, sqrt(E g~^2)>``: the sum over the neuron of the RMS gradient, measured at unit norm.
            Without it (or ``fan_in``) what depends on it is ``None``. The half-life has no closed form.
    """
    update_rms = adamw(lr=lr, weight_decay=weight_decay, betas=betas, fan_in=fan_in).update_rms
    norm = None if grad_l1 is None else _ratio(lr * grad_l1, 2 * weight_decay) ** (1 / 3)
    rotation = None if norm is None or update_rms is None else update_rms / norm
    return Equilibrium(norm=norm, update_rms=update_rms, rotation=rotation, half_life=None)


def sgdm(*, lr: float, weight_decay: float, momentum: float = 0.0, grad_norm: float | None = None) -> Equilibrium:
    """SGD with (heavy-ball) momentum and L2 regularization.

    ``rotation = sqrt(2 lr wd/(1+momentum))``, ``norm = (lr E|g~|^2/(2 wd (1-momentum)))^(1/4)``,
    ``update_rms = lr sqrt(E|g|^2/(1-momentum^2))`` with ``g = g~/norm``; half-life, of the fourth power of the norm:
    ``(1-momentum) ln 2/(4 lr wd)`` (paper, section 3.1).

    Args:
        grad_norm: RMS norm of the neuron's gradient measured at unit weight norm (``sqrt(E|g~|^2)``); without it
            ``norm`` and ``update_rms`` are ``None``.
    """
    norm = update_rms = None
    if grad_norm is not None:
        norm = _ratio(lr * grad_norm**2, 2 * weight_decay * (1 - momentum)) ** 0.25
        update_rms = lr * grad_norm / norm / math.sqrt(1 - momentum**2)
    return Equilibrium(
        norm=norm,
        update_rms=update_rms,
        rotation=math.sqrt(2 * lr * weight_decay / (1 + momentum)),
        half_life=_ratio((1 - momentum) * math.log(2), 4 * lr * weight_decay),
    )


def lion(
    *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.99), fan_in: int | None = None
) -> Equilibrium:
    """Lion (sign of an interpolated momentum, decoupled weight decay).

    With ``k^2 = (1-b1)^2 + b1^2 (1-b2)/(1+b2)``: ``rotation = sqrt(pi lr wd) k``, ``norm = sqrt(lr C/(pi wd))/k``,
    ``update_rms = lr sqrt(C)``, ``half_life = ln 2/(2 lr wd)``. The factor ``sqrt(pi/2)`` linearises the sign and needs
    ``lr wd << 1-b2`` besides (paper, section 3.2).
    """
    k = math.sqrt((1 - betas[0]) ** 2 + betas[0] ** 2 * (1 - betas[1]) / (1 + betas[1]))
    return Equilibrium(
        norm=None if fan_in is None else _sqrt_ratio(lr * fan_in, math.pi * weight_decay) / k,
        update_rms=None if fan_in is None else lr * math.sqrt(fan_in),
        rotation=math.sqrt(math.pi * lr * weight_decay) * k,
        half_life=_ratio(math.log(2), 2 * lr * weight_decay),
    )


def _ratio(numerator: float, denominator: float) -> float:
    """``numerator / denominator``, infinite where weight decay 0 leaves nothing to balance the growth."""
    return numerator / denominator if denominator else math.inf


def _sqrt_ratio(numerator: float, denominator: float) -> float:
    return math.sqrt(_ratio(numerator, denominator))
