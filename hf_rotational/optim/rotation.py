"""The rotation core: one step on the sphere, for any direction any inner optimizer comes up with.

A *neuron* is a slice of a weight tensor; ``dims`` are the dims that are reduced over, i.e. those that do not index
neurons. Per-neuron statistics keep the reduced dims with size 1, so that they broadcast against the weight. Neurons may
be spread over ranks: what needs sums over whole ones is a generator of sums (:mod:`hf_rotational.optim.sharding`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_rotational.optim.sharding import Sums


def reduced_dims(ndim: int, neuron_dims: tuple[int, ...]) -> tuple[int, ...]:
    """The dims of a tensor that one neuron spans: all but ``neuron_dims`` (negative dims count from the end)."""
    neurons = {dim % ndim for dim in neuron_dims}
    return tuple(dim for dim in range(ndim) if dim not in neurons)


ROUNDING_SQ = 64.0
"""What a projection leaves of a vector it should annihilate: 8 units of rounding, squared."""

SHORT = 4096
"""Entries of a neuron up to which torch's norm is as exact as its sum."""


def center_(tensor: Tensor, dims: tuple[int, ...], fan_in: int) -> Sums[Tensor]:
    """Subtracts from every neuron the mean of its ``fan_in`` entries, in place; returns the means."""
    mean = (yield tensor.sum(dims, keepdim=True)) / fan_in
    tensor.sub_(mean)
    return mean


def neuron_norm(weight: Tensor, dims: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Euclidean norm of every neuron, reduced dims kept with size 1; added up in ``dtype``, by default the weight's."""
    # Not torch's norm, which on CPUs adds up one after the other (of ten million entries it is off by 1e-3), and takes
    # ten times as long for columns. The root is not taken in place: of a sharded weight the squares are partial sums.
    norm: Tensor = weight.square().sum(dims, keepdim=True, dtype=dtype).sqrt()
    return norm


def size_sq_of(tensor: Tensor, dims: tuple[int, ...], fan_in: int) -> Tensor:
    """Squared norm of every neuron of ``fan_in`` entries, reduced dims kept with size 1."""
    if dims == tuple(range(tensor.ndim - len(dims), tensor.ndim)) and fan_in <= SHORT:
        # On a CPU five times as fast as what is below, and as exact while neurons are short and lie in one piece.
        norm: Tensor = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
        return norm.square_()
    return tensor.square().sum(dims, keepdim=True)


def rotate_(
    weight: Tensor,
    update: Tensor,
    *,
    norm: Tensor,
    update_norm_sq: Tensor,
    step: int,
    angle: float,
    lr: float,
    decay: float,
    eps: float,
    dims: tuple[int, ...],
    fan_in: int,
    center: bool = False,
    relative_size_sq: float = 1.0,
    learns: Tensor | None = None,
) -> Sums[None]:
    """Turns every neuron of ``weight`` by ``angle`` radians on average along ``-update``, its norm held at ``norm``,
    in place.

    One step of the paper's algorithm 1, written once for every optimizer::

        u  -= mean(u)                           with `center`
        u  -= p <u,p>/n^2                       the radial part goes
        nu  = decay nu + (1-decay) |u|^2        running average of the update's size, bias corrected by 1-decay^step;
                                                it begins with the first update that is not 0, as if all had been that
        p  -= angle n u/(sqrt(nu^)+eps)         a tangent step of the target size
        p  *= n/|p|                             back to the sphere

    Neurons are independent: a NaN or an infinity in one neuron's update makes that neuron NaN, as it would with the
    plain optimizer, and no other. A neuron whose norm was 0 when its state was made has no direction to turn: it
    takes the plain step ``p -= lr u`` for good. A neuron whose tangent update is 0, or no more than what rounding left
    of a radial or constant one, keeps its weights bit for bit.

    Args:
        weight: the parameter, in the dtype to compute in.
        update: the inner optimizer's direction, without learning rate and weight decay; overwritten.
        norm: norm to hold, per neuron.
        update_norm_sq: ``nu``, per neuron; updated in place. With ``lr == 0`` it is all that is updated.
        step: how many updates ``update_norm_sq`` has seen, this one included.
        angle: target angle in radians per step; a realised angle is ``atan(angle |u|/sqrt(nu^))``.
        lr: learning rate, for neurons of norm 0 only.
        decay: of the running average; 0 makes every step exactly ``atan(angle)``.
        eps: added to the update's size before dividing by it.
        dims: the dims one neuron spans.
        fan_in: its number of entries, on all ranks.
        center: take the mean out of the update.
        relative_size_sq: expected ``|u|^2`` of this step relative to a late one; the running average is of late sizes.
        learns: per neuron, whether this update counts in the running average; ``None``: all do.
    """
    rotates = norm > 0
    rests = ~rotates
    # A neuron of norm 0 has no tangent space: its update stays as it is.
    inverse_sq = norm.square().reciprocal_().masked_fill_(rests, 0.0)
    mean = (yield from center_(update, dims, fan_in)) if center else None
    projection = yield (update * weight).sum(dims, keepdim=True)
    radial = projection * inverse_sq
    removed_sq = projection * radial
    if mean is not None:
        removed_sq += mean.square() * fan_in
    update.addcmul_(weight, radial, value=-1)
    size_sq = yield size_sq_of(update, dims, fan_in)
    # Scaled up to the target angle, the rounding of a purely radial or constant update would be a full step of noise.
    is_noise = (size_sq > removed_sq.mul_(ROUNDING_SQ * torch.finfo(size_sq.dtype).eps ** 2)).logical_not_()
    late_size_sq = size_sq.masked_fill(is_noise, 0.0)
    if relative_size_sq != 1:
        late_size_sq /= relative_size_sq
    if learns is not None:
        late_size_sq = late_size_sq.where(learns, update_norm_sq)
    # Corrected below by the number of steps, an average that took the sizes 0 before it for updates would be too small.
    seen = 1 - decay**step
    new = torch.full_like(update_norm_sq, 1 - decay).masked_fill_(update_norm_sq == 0, seen)
    update_norm_sq.lerp_(late_size_sq, new)
    if lr == 0:
        return
    size = (update_norm_sq * (relative_size_sq / seen)).sqrt_().add_(eps)
    stays = is_noise.logical_or_(rests)
    length = (norm / size).mul_(angle).masked_fill_(stays, 0.0).masked_fill_(rests, lr)
    weight.addcmul_(update, length, value=-1)
    reached = (yield size_sq_of(weight, dims, fan_in)).sqrt()
    # Rescaling a neuron that did not move would still round it, so it is left alone.
    weight.mul_((norm / reached).masked_fill_(stays, 1.0))
