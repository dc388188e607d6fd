"""The steady state in closed form.

Symbols: ``C`` entries in the neuron (``fan_in``), ``lr`` learning rate, ``wd`` weight decay, ``b1`` and ``b2`` betas.
Every formula assumes gradients that are independent from step to step, and weight decay that is slow next to the
momentum: ``lr wd << 1-b1`` (SGD: ``lr wd << (1-momentum)^2``). It describes neurons whose scale does not matter (a
normalization follows). Each function adds what it needs besides; docs/equilibrium.md has measured deviations.

Numbers give numbers, in pure Python, as optimizers ask for the angle at every step. Where an argument is an array (or
a torch tensor), each of the record's values is one, of the shape that all arguments broadcast to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, overload

from typing_extensions import TypeVar

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Value: TypeAlias = float | NDArray[Any] | torch.Tensor

T = TypeVar("T", default=float)

NUMBER = (float, int)
"""As a tuple: ``isinstance`` makes the union of ``float | int`` anew at each call, and this is for every step."""

NON_NEGATIVE = (0.0, math.inf, "a finite number >= 0")
FRACTION = (0.0, 1.0, "in [0, 1)")
RANGES = {"beta1": FRACTION, "beta2": FRACTION, "momentum": FRACTION, "fan_in": (1.0, math.inf, "a finite number >= 1")}
"""What an argument has to be: at least the first number and below the second. Others may be any but negative."""
LABELS = {"beta1": "betas[0]", "beta2": "betas[1]"}
"""What a user calls it."""


@dataclass(frozen=True)
class Equilibrium(Generic[T]):
    """What a neuron settles to. A value is ``None`` where the arguments given do not determine it."""

    norm: T | None
    """Norm of the neuron's weight vector, in units of the weights."""
    update_rms: T | None
    """Root mean square norm of one step's update of the neuron, without weight decay, in units of the weights."""
    rotation: T | None
    """Expected angle the neuron turns per step, in radians."""
    half_life: T | None
    """Steps in which the distance of the squared norm (SGDM: of its square) from equilibrium halves."""


@overload
def adamw(
    *, lr: float, weight_decay: float, betas: tuple[float, float] = ..., fan_in: float | None = ...
) -> Equilibrium: ...
@overload
def adamw(
    *, lr: Value, weight_decay: Value, betas: tuple[Value, Value] = ..., fan_in: Value | None = ...
) -> Equilibrium[Any]: ...
def adamw(*, lr: Any, weight_decay: Any, betas: tuple[Any, Any] = (0.9, 0.999), fan_in: Any = None) -> Equilibrium[Any]:
    """AdamW (decoupled weight decay).

    ``rotation = sqrt(2 lr wd (1-b1)/(1+b1))``, ``update_rms = lr sqrt(C (1-b1)/(1+b1))``,
    ``norm = sqrt(lr C/(2 wd))``, ``half_life = ln 2/(2 lr wd)`` (paper, section 3.2; half-life derived from it).
    Behind a normalization, where gradients change with the norm, the half-life needs ``lr wd << 1-b2`` besides: the
    second moment has to keep up.

    Args:
        lr: learning rate.
        weight_decay: decoupled weight decay; at 0 there is no equilibrium: rotation 0, norm and half-life infinite.
        betas: AdamW's betas; the second does not enter.
        fan_in: entries in the neuron; without it ``norm`` and ``update_rms`` are ``None``.

    Raises:
        ValueError: for an argument out of range, naming it and its value.
    """
    beta1, beta2 = _two(betas)
    lr, weight_decay, beta1, _, fan_in = checked(
        lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, fan_in=fan_in
    )
    smoothing = (1 - beta1) / (1 + beta1)
    return Equilibrium(
        norm=None if fan_in is None else _ratio(lr * fan_in, 2 * weight_decay) ** 0.5,
        update_rms=None if fan_in is None else lr * (fan_in * smoothing) ** 0.5,
        rotation=(2 * lr * weight_decay * smoothing) ** 0.5,
        half_life=_ratio(math.log(2), 2 * lr * weight_decay),
    )


@overload
def adam_l2(
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = ...,
    fan_in: float | None = ...,
    grad_l1: float | None = ...,
) -> Equilibrium: ...
@overload
def adam_l2(
    *,
    lr: Value,
    weight_decay: Value,
    betas: tuple[Value, Value] = ...,
    fan_in: Value | None = ...,
    grad_l1: Value | None = ...,
) -> Equilibrium[Any]: ...
def adam_l2(
    *, lr: Any, weight_decay: Any, betas: tuple[Any, Any] = (0.9, 0.999), fan_in: Any = None, grad_l1: Any = None
) -> Equilibrium[Any]:
    """Adam with L2 regularization: there the angle depends on the gradient, so neurons are not balanced (section 3.3).

    ``norm = (lr/(2 wd) <1, sqrt(E g~^2)>)^(1/3)``, ``update_rms`` as AdamW's, ``rotation = update_rms / norm``; the
    half-life has no closed form. Holds where the regularization is small next to the gradient in the second moment,
    and the norm slow next to ``1-b2``.

    Args:
        lr, weight_decay, betas, fan_in: as for :func:`adamw`.
        grad_l1: ``<1, sqrt(E g~^2)>``: the sum over the neuron of the RMS gradient, measured at unit norm.
            Without it (or ``fan_in``) what depends on it is ``None``.

    Raises:
        ValueError: for an argument out of range, naming it and its value.
    """
    beta1, beta2 = _two(betas)
    lr, weight_decay, beta1, beta2, fan_in, grad_l1 = checked(
        lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, fan_in=fan_in, grad_l1=grad_l1
    )
    norm = rotation = None
    if grad_l1 is not None:
        norm = _ratio(lr * grad_l1, 2 * weight_decay) ** (1 / 3)
    if grad_l1 is not None and fan_in is not None:
        smoothing = (1 - beta1) / (1 + beta1)
        # update_rms / norm, written so that it is 0 at lr or weight decay 0.
        rotation = (fan_in * smoothing) ** 0.5 * _ratio(2 * weight_decay * lr**2, grad_l1) ** (1 / 3)
    update_rms = adamw(lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), fan_in=fan_in).update_rms
    return Equilibrium(norm=norm, update_rms=update_rms, rotation=rotation, half_life=None)


@overload
def sgdm(*, lr: float, weight_decay: float, momentum: float = ..., grad_norm: float | None = ...) -> Equilibrium: ...
@overload
def sgdm(
    *, lr: Value, weight_decay: Value, momentum: Value = ..., grad_norm: Value | None = ...
) -> Equilibrium[Any]: ...
def sgdm(*, lr: Any, weight_decay: Any, momentum: Any = 0.0, grad_norm: Any = None) -> Equilibrium[Any]:
    """SGD with (heavy-ball) momentum and L2 regularization.

    ``rotation = sqrt(2 lr wd/(1+momentum))``, ``norm = (lr E|g~|^2/(2 wd (1-momentum)))^(1/4)``,
    ``update_rms = lr sqrt(E|g|^2/(1-momentum^2))`` with ``g = g~/norm``; half-life, of the fourth power of the norm:
    ``(1-momentum) ln 2/(4 lr wd)`` (paper, section 3.1). Needs gradients in inverse proportion to the norm, as behind a
    normalization.

    Args:
        lr: learning rate.
        weight_decay: L2 regularization; at 0 there is no equilibrium: rotation 0, norm and half-life infinite.
        momentum: decay of the sum of gradients.
        grad_norm: RMS norm of the neuron's gradient measured at unit weight norm (``sqrt(E|g~|^2)``); without it
            ``norm`` and ``update_rms`` are ``None``.

    Raises:
        ValueError: for an argument out of range, naming it and its value.
    """
    lr, weight_decay, momentum, grad_norm = checked(
        lr=lr, weight_decay=weight_decay, momentum=momentum, grad_norm=grad_norm
    )
    norm = update_rms = None
    if grad_norm is not None:
        norm = _ratio(lr * grad_norm**2, 2 * weight_decay * (1 - momentum)) ** 0.25
        # lr grad_norm/norm/sqrt(1-momentum^2), without dividing by a norm that may be 0.
        update_rms = (2 * weight_decay * (1 - momentum) * lr**3 * grad_norm**2) ** 0.25 / (1 - momentum**2) ** 0.5
    return Equilibrium(
        norm=norm,
        update_rms=update_rms,
        rotation=(2 * lr * weight_decay / (1 + momentum)) ** 0.5,
        half_life=_ratio((1 - momentum) * math.log(2), 4 * lr * weight_decay),
    )


@overload
def lion(
    *, lr: float, weight_decay: float, betas: tuple[float, float] = ..., fan_in: float | None = ...
) -> Equilibrium: ...
@overload
def lion(
    *, lr: Value, weight_decay: Value, betas: tuple[Value, Value] = ..., fan_in: Value | None = ...
) -> Equilibrium[Any]: ...
def lion(*, lr: Any, weight_decay: Any, betas: tuple[Any, Any] = (0.9, 0.99), fan_in: Any = None) -> Equilibrium[Any]:
    """Lion (sign of an interpolated momentum, decoupled weight decay).

    With ``k^2 = (1-b1)^2 + b1^2 (1-b2)/(1+b2)``: ``rotation = sqrt(pi lr wd) k``, ``norm = sqrt(lr C/(pi wd))/k``,
    ``update_rms = lr sqrt(C)``, ``half_life = ln 2/(2 lr wd)``. The factor ``sqrt(pi/2)`` linearises the sign and needs
    ``lr wd << 1-b2`` besides (paper, section 3.2).

    Args:
        lr, weight_decay, fan_in: as for :func:`adamw`.
        betas: the share of momentum in the sign, and momentum's decay; both enter.

    Raises:
        ValueError: for an argument out of range, naming it and its value.
    """
    beta1, beta2 = _two(betas)
    lr, weight_decay, beta1, beta2, fan_in = checked(
        lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2, fan_in=fan_in
    )
    k = ((1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)) ** 0.5
    return Equilibrium(
        norm=None if fan_in is None else _ratio(lr * fan_in, math.pi * weight_decay) ** 0.5 / k,
        update_rms=None if fan_in is None else lr * fan_in**0.5,
        rotation=(math.pi * lr * weight_decay) ** 0.5 * k,
        half_life=_ratio(math.log(2), 2 * lr * weight_decay),
    )


def checked(**arguments: Any) -> Iterable[Any]:
    """The arguments' values, once they are in range; if any is an array, arrays of one shape. ``None`` stays.

    Raises:
        ValueError: for the first that is out of its range.
    """
    shaped: Any = None  # zeros of the shape that the arrays broadcast to
    for name, value in arguments.items():
        if value is None:
            continue
        low, end, text = RANGES.get(name, NON_NEGATIVE)
        if isinstance(value, NUMBER):
            if not low <= value < end:
                raise ValueError(f"Invalid {LABELS.get(name, name)}: {value} (must be {text})")
            continue
        wrong = ~((value >= low) & (value < end))
        if wrong.any():
            raise ValueError(f"Invalid {LABELS.get(name, name)}: {value[wrong].flatten()[0]} (must be {text})")
        shaped = 0 * value if shaped is None else shaped + 0 * value
    if shaped is None:
        return arguments.values()
    return [None if value is None else value + shaped for value in arguments.values()]


def _two(betas: tuple[Any, Any]) -> tuple[Any, Any]:
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas} (two numbers are needed)")
    return betas


def _ratio(numerator: Any, denominator: Any) -> Any:
    """``numerator / denominator``, infinite where weight decay 0 leaves nothing to balance the growth."""
    if isinstance(denominator, NUMBER):
        return numerator / denominator if denominator else math.inf
    import numpy as np

    with np.errstate(divide="ignore"):
        # 0/0 is infinite too. The product gives a number the array's dtype.
        return (numerator + 0 * denominator + (denominator == 0)) / denominator
