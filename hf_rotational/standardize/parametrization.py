"""The one parametrization: a weight as gain and mean of each neuron, and what is left."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

MODES = ("function_preserving", "drop_mean", "gain")
"""What ``mode`` may be: see :func:`hf_rotational.standardize.standardize`."""

EPS = 1e-12
"""Added to a neuron's variance. Gains start at ``sqrt(variance + EPS)``, so it changes no weight, whatever its size."""


class Standardization(nn.Module):
    """Computes a weight ``W`` from a tensor ``V`` of its shape and from parameters with one entry per neuron.

    With ``mean`` and ``var`` (biased) over the entries of each neuron of ``V``:

    - ``"function_preserving"``: ``W = gain_norm (V - mean(V)) / sqrt(var(V) + EPS) + mean_bias``
    - ``"drop_mean"``: ``W = gain_norm (V - mean(V)) / sqrt(var(V) + EPS)``
    - ``"gain"``: ``W = gain_norm V``

    At the start ``V`` is the weight, ``gain_norm`` is ``sqrt(var + EPS)`` (1 for ``"gain"``), ``mean_bias`` the mean:
    they are measured once. A neuron without variance is its mean; since ``gain_norm / sqrt(EPS)`` is 1, it has at first
    the gradients of a plain weight.

    Args:
        weight: the plain weight.
        neuron_dims: its dims that index neurons, in order.
        mode: one of :data:`MODES`.
        owners: how many modules share the weight.
    """

    # The names keep the Trainer from decaying these, with whichever optimizer: its rule leaves out what ends in "_norm"
    # or has "bias" in it. That they have one dim, for stacked experts too, keeps out those who decay what has two.
    gain_norm: nn.Parameter
    mean_bias: nn.Parameter | None

    def __init__(self, weight: Tensor, neuron_dims: tuple[int, ...], mode: str, owners: int = 1) -> None:
        super().__init__()
        self.mode = mode
        self.neuron_dims = neuron_dims
        self.owners = owners
        self.held: Tensor | None = None  # the weight, during the forward of a module that reads it many times
        self.saved: weakref.ref[Tensor] | None = None  # the weight in the last state dict
        start = self.split(weight)
        self.gain_norm = nn.Parameter(start["0.gain_norm"])
        mean = start.get("0.mean_bias")
        self.register_parameter("mean_bias", None if mean is None else nn.Parameter(mean))

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that make up ``weight``, by their names in the ``ParametrizationList``."""
        weight = weight.detach()
        rows = self.rows(_whole(weight)).to(torch.promote_types(weight.dtype, torch.float32))
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
        parts = {"0.gain_norm": torch.ones_like(mean) if self.mode == "gain" else (variance + EPS).sqrt()}
        if self.mode == "function_preserving":
            parts["0.mean_bias"] = mean
        shared = {name: _replicated(part.to(weight.dtype), weight) for name, part in parts.items()}
        return {"original": weight, **shared}

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        """What torch calls for ``module.weight = tensor``: takes the tensor apart anew, returns ``V``."""
        parts = self.split(weight)
        self.gain_norm.copy_(parts["0.gain_norm"])
        if self.mean_bias is not None:
            self.mean_bias.copy_(parts["0.mean_bias"])
        return parts["original"]

    def forward(self, original: Tensor) -> Tensor:
        """``W`` of ``V``, as modules read it."""
        if self.held is not None:
            return self.held
        weight = self.weight(original)
        plain = type(weight) is Tensor and not torch.compiler.is_compiling()
        return weight.as_subclass(ComputedWeight) if plain else weight

    def weight(self, original: Tensor) -> Tensor:
        """``W`` of ``V``, with its shape, dtype and sharding."""
        if not hasattr(original, "placements"):
            return self.compute(original, self.gain_norm, self.mean_bias)
        # FSDP2 unshards for a forward. Outside of one, whoever reads a weight gets it sharded as its V is.
        mean = None if self.mean_bias is None else _whole(self.mean_bias)
        weight = _replicated(self.compute(_whole(original), _whole(self.gain_norm), mean), original)
        return weight.redistribute(placements=original.placements)  # type: ignore[attr-defined, no-any-return]

    def compute(self, weight: Tensor, gain: Tensor, mean: Tensor | None) -> Tensor:
        """``W`` of whole tensors.

        Torch's normalizations are this formula with forward and backward in one pass each, gain and mean included: a
        group norm with a group for each row, a batch norm over columns, which need not be transposed.
        """
        dims = self.neuron_dims
        if self.mode == "gain":
            return weight * gain.view([size if dim in dims else 1 for dim, size in enumerate(weight.shape)])
        if dims == tuple(range(weight.ndim - len(dims), weight.ndim)):
            columns = weight.reshape(-1, len(gain))
            return F.batch_norm(columns, None, None, gain, mean, training=True, eps=EPS).view(weight.shape)
        front = tuple(range(len(dims)))
        stack = weight.movedim(dims, front)
        rows = stack.reshape(1, len(gain), -1)
        return F.group_norm(rows, len(gain), gain, mean, EPS).view(stack.shape).movedim(front, dims)

    def rows(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as neurons by entries."""
        neurons = math.prod(weight.shape[dim] for dim in self.neuron_dims)
        return weight.movedim(self.neuron_dims, tuple(range(len(self.neuron_dims)))).reshape(neurons, -1)

    def extra_repr(self) -> str:
        return f"{len(self.gain_norm)} neurons along dims {self.neuron_dims}, mode={self.mode!r}"


class ComputedWeight(torch.Tensor):
    """A weight that was computed. What is assigned to its ``data``, as peft does to merge an adapter, would be lost."""

    # As for nn.Parameter: what is computed from it is a plain tensor, at no cost.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(
            "This weight is computed by a standardization, so what is assigned to it would be lost. Call "
            "hf_rotational.fold(model) first, which makes it a plain weight (peft: before merging an adapter)."
        )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _replicated(tensor: Tensor, reference: Tensor) -> Tensor:
    """A tensor that every rank has, as a DTensor on the ranks of another, if that is one."""
    if not hasattr(reference, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = reference.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def standardization_of(module: nn.Module) -> Standardization | None:
    """The standardization in a ``ParametrizationList``; None in any other, and in any other module."""
    first: Any = module[0] if isinstance(module, ParametrizationList) else None
    return first if isinstance(first, Standardization) else None
