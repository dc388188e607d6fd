"""How modules store their weights: the table the plan reads.

A neuron is what makes one output feature of a module: a row of ``nn.Linear``, a column of GPT-2's ``Conv1D``, a column
of one expert in a stack of them. The row of the table that fits says which dims of the weight index neurons. Each is
proved numerically, over all of transformers, by ``tests/integration/test_zoo.py``; what cannot be proved is not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

PROVED_PACKAGES = ("torch.", "transformers.")
"""Where the classes live that the tests go through: elsewhere, a subclass or a name promises nothing."""

UNKNOWN = "not a known weight matrix"


@dataclass(frozen=True)
class Layout:
    """Which dims of one weight index neurons, or why that is not known."""

    neuron_dims: tuple[int, ...] = ()
    """Empty if it cannot rotate."""
    reason: str = ""
    """Why it does not rotate, or not unless it is included by name; empty if it does."""


Dims = tuple[int, ...] | str | Callable[[nn.Module], tuple[int, ...] | str]
"""Neuron dims; or the reason why there are none; or what finds out for a module."""


def _transposed_convolution(module: nn.Module) -> tuple[int, ...] | str:
    # The weight is (in, out / groups, ...): with groups, dim 0 says which group, but only together with the inputs.
    return (1,) if module.groups == 1 else "grouped transposed convolution: no dims index its neurons"


def _experts(module: nn.Module) -> tuple[int, ...] | str:
    # transformers marks every class of experts it can dispatch to a kernel with how its weights are stored.
    transposed = getattr(module, "is_transposed", None)
    return UNKNOWN if transposed is None else (0, 2) if transposed else (0, 1)


BY_CLASS: tuple[tuple[type[nn.Module], str, Dims], ...] = (
    (nn.Linear, r"weight", (0,)),
    (Conv1D, r"weight", (1,)),
    (_ConvTransposeNd, r"weight", _transposed_convolution),
    (_ConvNd, r"weight", (0,)),  # also when grouped: every output channel has its own slice of dim 0
    (nn.MultiheadAttention, r"(in|q|k|v)_proj_weight", (0,)),
    (nn.Embedding, r"weight", (0,)),
    (nn.RNNBase, r"weight_.*", "recurrent layer: a neuron is spread over two weights"),
    (ParametrizationList, r".*", "parametrized by the model"),
)
"""Class (subclasses included), parameter names, neuron dims; the first row that fits counts."""

BY_NAME: tuple[tuple[str, str, Dims], ...] = (
    # Mixture of experts. The router's features are the experts' logits.
    (r"\w+Router", r"weight", (0,)),
    (r"InklingSharedExperts", r"(gate|up|down)_proj", (0, 1)),
    (r"Llama4TextExperts", r"(gate_up|down)_proj", (0, 2)),
    (r"LongcatFlashExperts", r"(gate_up|down)_proj", (0, 1)),
    (r"JetMoeParallelExperts", r"weight", (0, 1)),
    (r"DbrxExpertGLU", r"[wv]1", (0,)),
    (r"DbrxExpertGLU", r"w2", "experts stacked along their inputs: no dims index its neurons"),
    (r"\w+Experts", r"(gate_up|gate|up|down)_proj", _experts),
    # Products written out in a forward. XLNet indexes a neuron by its head and its entry in the head.
    (r"XLNetRelativeAttention", r"[qkvr]", (1, 2)),
    (r"XLNetRelativeAttention", r"o", (0,)),
    (r"(Gemma3|T5Gemma2)MultiModalProjector", r"mm_input_projection_weight", (1,)),
    (r"RecurrentGemmaRglru", r"(input|recurrent)_gate_weight", (0, 2)),
    (r"\w+HyperConnection", r"fn", (0,)),
    (r"\w+HyperHead", r"hc_fn", (0,)),
    (r"GroupedLinearLayer", r"weight", (0, 2)),
    (r"CsmCodebooksHead", r"weight", (0, 2)),
    (r"ZambaMambaMixer", r"(x|dt)_proj_weight", (0, 1)),
)
"""Classes of transformers by name, so that no model has to be imported to recognise it; otherwise as above."""


def layout(module: nn.Module, name: str) -> Layout:
    """How ``module`` stores its parameter ``name``."""
    ancestors = [cls for cls in type(module).__mro__ if cls.__module__.startswith("transformers.")]
    for cls, names, dims in BY_CLASS:
        if isinstance(module, cls) and re.fullmatch(names, name):
            reason = "" if _forward_is_proved(module) else "its class has a forward of its own"
            return _resolve(module, name, dims, reason)
    for pattern, names, dims in BY_NAME:
        if re.fullmatch(names, name) and any(re.fullmatch(pattern, cls.__name__) for cls in ancestors):
            return _resolve(module, name, dims, "")
    return Layout(reason=UNKNOWN)


def _resolve(module: nn.Module, name: str, dims: Dims, reason: str) -> Layout:
    found = dims(module) if callable(dims) else dims
    if isinstance(found, str):
        return Layout(reason=found)
    # Quantized and sharded forms keep the class and the name, but not the shape.
    return Layout(found, reason) if max(found) < getattr(module, name).ndim else Layout(reason=UNKNOWN)


def _forward_is_proved(module: nn.Module) -> bool:
    return str(getattr(type(module).forward, "__module__", "")).startswith(PROVED_PACKAGES)
