"""The plan: which parameters of a model rotate, and which of their dims index neurons.

Decided by the class of the module that owns the parameter, since that is what says how the weight is stored: a neuron
is a row of ``nn.Linear`` but a column of GPT-2's ``Conv1D``. What is not known to be a weight matrix does not rotate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

MIN_FAN_IN = 3
"""Smallest neuron that rotates: with two entries whose mean is held, or with one, there is nowhere to turn."""

NEURON_DIMS: dict[type[nn.Module], tuple[int, ...]] = {nn.Linear: (0,), Conv1D: (1,)}
"""Module class (subclasses included) to the dims of its ``weight`` that index neurons."""

TASK_HEADS = frozenset({"classifier", "score", "qa_outputs", "classification_head"})
"""Modules by which transformers' task models name the head that is new when a pretrained body is fine-tuned."""


@dataclass(frozen=True)
class PlannedParameter:
    """What the plan says of one parameter."""

    name: str
    """Name in ``model.named_parameters()``."""
    parameter: nn.Parameter
    module_type: str
    """Class name of the module that owns it."""
    neuron_dims: tuple[int, ...]
    """Dims that index neurons; empty if it does not rotate."""
    reason: str
    """Why it rotates, or why not."""

    @property
    def rotates(self) -> bool:
        """Whether it rotates."""
        return bool(self.neuron_dims)


@dataclass(frozen=True)
class RotationPlan:
    """Which parameters rotate; prints as a table. Made by :func:`plan`."""

    entries: tuple[PlannedParameter, ...]

    def __iter__(self) -> Iterator[PlannedParameter]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def rotating(self) -> tuple[PlannedParameter, ...]:
        """The entries that rotate."""
        return tuple(entry for entry in self if entry.rotates)

    def parameter_groups(
        self,
        *,
        weight_decay: float | None = None,
        decays: Callable[[str], bool] | None = None,
        rotating: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Parameter groups for a rotational optimizer; parameters that do not require a gradient are left out.

        Args:
            weight_decay: for parameters that do not rotate; by default the optimizer's own.
            decays: which of those (by name) decay at all; by default those with two or more dims.
            rotating: settings of the rotating groups; a ``"weight_decay"`` there sets their angle.
        """
        decays = decays or (lambda name: by_name[name].ndim >= 2)
        by_name = {entry.name: entry.parameter for entry in self}
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for entry in self:
            if not entry.parameter.requires_grad:
                continue
            settings: dict[str, Any] = {"rotational": entry.rotates}
            if entry.rotates:
                settings |= {"neuron_dims": entry.neuron_dims, **(rotating or {})}
            elif not decays(entry.name):
                settings["weight_decay"] = 0.0
            elif weight_decay is not None:
                settings["weight_decay"] = weight_decay
            group = groups.setdefault(tuple(settings.items()), {"params": [], **settings})
            group["params"].append(entry.parameter)
        return list(groups.values())

    def summary(self) -> str:
        """One line: how many parameters (tensors and entries) rotate."""
        entries = sum(entry.parameter.numel() for entry in self)
        rotating = sum(entry.parameter.numel() for entry in self.rotating)
        share = rotating / max(entries, 1)
        return (
            f"{len(self.rotating)} of {len(self)} tensors rotate: {rotating:,} of {entries:,} parameters ({share:.1%})"
        )

    def __str__(self) -> str:
        header = ("parameter", "module", "shape", "neurons", "rotates")
        rows = [header] + [
            (
                entry.name,
                entry.module_type,
                "x".join(map(str, entry.parameter.shape)),
                ",".join(map(str, entry.neuron_dims)) or "-",
                ("yes: " if entry.rotates else "no: ") + entry.reason,
            )
            for entry in self
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", self.summary()])


def plan(
    model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = (), embeddings: bool = False
) -> RotationPlan:
    """Decides for every parameter of a model whether it rotates, and along which dims its neurons lie.

    Rotating: the weights of ``nn.Linear`` (neurons are rows) and of GPT-2's ``Conv1D`` (neurons are columns). Not
    rotating: embeddings and whatever is tied to one, new task heads, vectors, neurons with fewer than 3 entries,
    weights that are zero, and every parameter of a module class not known.

    Args:
        model: any module; frozen parameters are planned too (an optimizer leaves them out).
        include: regular expressions searched in parameter names; a match rotates whatever its reason not to,
            provided its module class is known.
        exclude: regular expressions; a match does not rotate. Wins over ``include``.
        embeddings: rotate ``nn.Embedding`` weights (a neuron is a token's row) and what is tied to them.

    Raises:
        ValueError: for a pattern that is no regular expression, or that matches no parameter.
    """
    includes, excludes = _compile(model, "include", include), _compile(model, "exclude", exclude)
    entries = []
    for name, parameter, owners in _owners(model):
        dims, reason = _layout(parameter, owners, embeddings, force=_matches(includes, name))
        if _matches(excludes, name):
            dims, reason = (), "excluded"
        entries.append(PlannedParameter(name, parameter, type(owners[0][1]).__name__, dims, reason))
    return RotationPlan(tuple(entries))


def _layout(
    parameter: nn.Parameter, owners: list[tuple[str, nn.Module]], embeddings: bool, force: bool
) -> tuple[tuple[int, ...], str]:
    """Neuron dims (empty: does not rotate) and the reason, given every place the parameter is used."""
    if parameter.ndim < 2:
        return (), f"{parameter.ndim} dims"
    layouts = {_module_dims(path, module) for path, module in owners}
    embedded = any(isinstance(module, nn.Embedding) for _, module in owners)
    if None in layouts or len(layouts) > 1:
        return (), "not a known weight matrix"
    dims = next(iter(layouts)) or ()
    fan_in = parameter.numel() // max(1, math.prod(parameter.shape[dim] for dim in dims))
    if embedded and not (embeddings or force):
        return (), "embedding" if len(owners) == 1 else "tied to an embedding"
    if fan_in < MIN_FAN_IN:
        return (), f"fan-in {fan_in} is below {MIN_FAN_IN}"
    if parameter.device.type != "meta" and not torch.any(parameter.detach() != 0):
        return (), "zero at the start"
    if not force and any(TASK_HEADS & set(path.split(".")) for path, _ in owners):
        return (), "task head"
    return dims, "included" if force else "tied weight matrix" if len(owners) > 1 else "weight matrix"


def _module_dims(path: str, module: nn.Module) -> tuple[int, ...] | None:
    if path.rpartition(".")[2] != "weight":
        return None
    if isinstance(module, nn.Embedding):
        return (0,)
    return next((dims for cls, dims in NEURON_DIMS.items() if isinstance(module, cls)), None)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[tuple[str, nn.Module]]]]:
    """Every parameter once, under its first name, with each (path, module) that holds it: ties have several."""
    uses: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses.setdefault(parameter, []).append((f"{prefix}.{name}" if prefix else name, module))
    for name, parameter in model.named_parameters():
        yield name, parameter, uses[parameter]


def _compile(model: nn.Module, argument: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r} must be a sequence of regular expressions, not one string")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{argument}: {pattern!r} is not a regular expression ({error})") from None
        if not any(compiled[-1].search(name) for name, _ in model.named_parameters()):
            raise ValueError(f"{argument}: {pattern!r} matches no parameter of {type(model).__name__}")
    return compiled


def _matches(patterns: list[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)
