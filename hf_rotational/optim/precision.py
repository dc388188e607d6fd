"""Write-back: how a weight computed in float32 gets into a 16-bit parameter.

Rounding to nearest loses a step that is small against the weight's last bit: at 1e-4 radians most bfloat16 entries
never move. ``kahan`` keeps what rounding cut off in a buffer of the parameter's dtype and adds it to the next step;
``stochastic`` rounds up or down with the probability that makes the rounding right on average, and keeps nothing. For
float32 and float64 parameters all three are the same: the step is computed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "kahan", "stochastic")
COMPENSATION = "compensation"
"""State key of what ``kahan`` rounding cut off."""


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """What state is kept and arithmetic is done in: float32, or float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What long sums are taken in: float64 where the device has it (Apple's and some of Intel's do not)."""
    return torch.float64 if tensor.device.type in ("cpu", "cuda") else compute_dtype(tensor)


def read(parameter: Tensor, state: dict[str, Any], rounding: str) -> Tensor:
    """The weight of a detached parameter in the dtype to compute in: the parameter itself where that is its own."""
    dtype = compute_dtype(parameter)
    if parameter.dtype == dtype:
        return parameter
    weight = parameter.to(dtype)
    if rounding == "kahan" and COMPENSATION in state:
        weight += state[COMPENSATION]
    return weight


def prepare(
    parameter: Tensor, state: dict[str, Any], rounding: str, place: int, *, moves: bool
) -> torch.Generator | None:
    """Makes what a rounding keeps of a parameter; returns what stochastic rounding draws from, anew in every step.

    Args:
        parameter: in the dtype it is stored in.
        state: the parameter's; holds the Kahan compensation, or how often it was rounded stochastically.
        rounding: one of :data:`ROUNDINGS`.
        place: of the parameter in its optimizer. Place and count seed the stochastic rounding, so that it repeats when
            a run is resumed and replicas of a parameter do not drift apart.
        moves: whether the step changes the parameter. One that does not has to make state all the same:
            torch.distributed.checkpoint loads only what there is after a step with ``lr == 0``.
    """
    if parameter.dtype == compute_dtype(parameter):
        return None
    if rounding == "kahan" and COMPENSATION not in state:
        state[COMPENSATION] = torch.zeros_like(parameter)
    if rounding != "stochastic":
        return None
    state.setdefault("roundings", 0)
    if not moves:
        return None
    state["roundings"] += 1
    return torch.Generator(parameter.device).manual_seed((place << 32) + state["roundings"])


def write(
    parameter: Tensor, weight: Tensor, state: dict[str, Any], rounding: str, draws: torch.Generator | None
) -> None:
    """Stores a weight that :func:`read` gave and a step has changed, in the way that :func:`prepare` has made ready.

    Args:
        parameter: where to, or a part of it.
        weight: in the dtype computed in.
        state: the parameter's, or a part of it.
        rounding: one of :data:`ROUNDINGS`.
        draws: what stochastic rounding draws from.
    """
    if weight.dtype == parameter.dtype:
        return  # computed in place
    if draws is not None:
        parameter.copy_(stochastically_rounded(weight, parameter.dtype, draws))
        return
    parameter.copy_(weight)
    if rounding == "kahan":
        state[COMPENSATION].copy_(weight - parameter)


def stochastically_rounded(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``tensor`` in a narrower dtype: each entry one of its two neighbours there, right on average.

    Entries the dtype holds exactly, infinities and NaN stay as they are.
    """
    nearest = tensor.to(dtype)
    error = tensor - nearest
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, towards)
    gap = (other.to(tensor.dtype) - nearest).abs()
    draw = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
    return torch.where(draw * gap < error.abs(), other, nearest)
