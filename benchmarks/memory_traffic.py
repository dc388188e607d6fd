"""A stand-in for an optimizer that only moves what a rotational step has to move: the floor under its time.

A weight, its gradient and its moments are read, weight and moments are written, in one pass: 28 bytes a weight for
AdamW, 20 for SGD with momentum and for Lion. Where neurons are columns, how far a weight moves is known when all of its
column has been seen: its direction is written, and read once more with the weight.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hf_rotational import plan
from hf_rotational.optim.kernels.build import library


class Tensors(NamedTuple):
    """What belongs to a weight."""

    weight: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor | None
    columns: bool
    """Whether its neurons are."""


class MemoryTraffic:
    """Reads and writes of a rotational optimizer's step.

    Args:
        model: has gradients, in float32 on a CPU.
        moments: of the optimizer: 1 or 2.
    """

    def __init__(self, model: nn.Module, moments: int) -> None:
        functions = ctypes.CDLL(str(library(Path(__file__).with_suffix(".c"))))
        address, number = ctypes.c_void_p, ctypes.c_int64
        self._look, self._look_again = functions.look, functions.look_again
        self._look.argtypes, self._look_again.argtypes = [address] * 5 + [number], [address] * 2 + [number]
        self._look.restype = self._look_again.restype = None
        self._tensors = [
            Tensors(
                weight.detach(),
                weight.grad,
                torch.zeros_like(weight),
                torch.zeros_like(weight) if moments == 2 else None,
                group["rotational"] and group["neuron_dims"] == (1,),
            )
            for group in plan(model).parameter_groups()
            for weight in group["params"]
        ]
        self._directions = torch.zeros(max(tensors.weight.numel() for tensors in self._tensors))

    def step(self) -> None:
        for weight, grad, first, second, columns in self._tensors:
            n, directions = weight.numel(), self._directions.data_ptr() if columns else None
            moments = first.data_ptr(), None if second is None else second.data_ptr()
            self._look(weight.data_ptr(), grad.data_ptr(), *moments, directions, n)
            if columns:
                self._look_again(weight.data_ptr(), directions, n)
