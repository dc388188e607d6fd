"""The plan: which parameters of a model rotate, and which of their dims index neurons.

Decided by the class of the module that owns the parameter, since that is what says how the weight is stored
(:mod:`hf_rotational.layouts`). What is not known to be a weight matrix does not rotate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations
from transformers import PreTrainedModel

from hf_rotational.layouts import UNKNOWN, Layout, layout

MIN_FAN_IN = 3
"""Smallest neuron that rotates: with two entries whose mean is held, or with one, there is nowhere to turn."""

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Dtypes of weights that train; the others hold quantized ones."""

LABEL_TASKS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector)")
"""Model classes that predict the user's own labels: what they add to the pretrained body is new, and is the head."""

HEAD_NAMES = re.compile(
    r"(?:[^\d.][^.]*\.)*"  # not within a stack of layers, whose routers may have a classifier
    r"(?:classifier|classification_head|score|qa_outputs|ctc_head|class_(?:predictor|embed|labels_classifier)"
    r"|enc_score_head|enc_out_class_embed)\."
)
"""Start of a parameter's name in the head of a model that has no body apart, or in the last layer of a detector's."""

DENSE_TASKS = re.compile(r"For\w*(Segmentation|Detection)")
"""Model classes that predict labels by more than a new last layer."""


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
    multiplier: float = 1.0
    """Factor on its target angle."""

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
                if entry.multiplier != 1:
                    settings["rotation_scale"] = entry.multiplier
            elif not decays(entry.name):
                settings["weight_decay"] = 0.0
            elif weight_decay is not None:
                settings["weight_decay"] = weight_decay
            group = groups.setdefault(tuple(settings.items()), {"params": [], **settings})
            group["params"].append(entry.parameter)
        return list(groups.values())

    def summary(self) -> str:
        """One line: how many parameters (tensors and entries) rotate."""
        return rotating_share([entry.parameter for entry in self.rotating], [entry.parameter for entry in self])

    def __str__(self) -> str:
        header = ("parameter", "module", "shape", "neurons", "rotates")
        rows = [
            (
                entry.name,
                entry.module_type,
                "?" if is_lazy(entry.parameter) else "x".join(map(str, entry.parameter.shape)),
                ",".join(map(str, entry.neuron_dims)) or "-",
                ("yes: " if entry.rotates else "no: ")
                + entry.reason
                + (f", angle x {entry.multiplier:g}" if entry.multiplier != 1 else ""),
            )
            for entry in self
        ]
        return f"{table(header, rows)}\n\n{self.summary()}"


def is_lazy(parameter: Tensor) -> bool:
    """Whether a parameter has no shape before the first forward pass."""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def rotating_share(rotating: Sequence[Tensor], parameters: Sequence[Tensor]) -> str:
    """One line: how many of the parameters (tensors and entries) rotate."""
    part, whole = (
        sum(tensor.numel() for tensor in tensors if not is_lazy(tensor)) for tensors in (rotating, parameters)
    )
    share = part / max(whole, 1)
    return f"{len(rotating)} of {len(parameters)} tensors rotate: {part:,} of {whole:,} parameters ({share:.1%})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plan(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    heads: bool = False,
    multipliers: Mapping[str, float] | None = None,
) -> RotationPlan:
    """Decides for every parameter of a model whether it rotates, and along which dims its neurons lie.

    Rotating: the weights of linear layers, convolutions, attention, routers and stacked experts, as
    :mod:`hf_rotational.layouts` lists them. Not rotating: embeddings and whatever is tied to one, new task heads,
    LoRA's B, vectors, neurons with fewer than 3 entries, quantized weights, and every parameter whose storage is not
    known. Neurons that are zero when training begins are planned as they would be otherwise, and take the plain step
    (:class:`~hf_rotational.optim.optimizer.RotationalOptimizer`). In a standardized model
    (:func:`~hf_rotational.standardize.standardize`) what weights are computed from rotates as they would, gains and
    means do not.

    Args:
        model: any module; frozen parameters are planned too (an optimizer leaves them out).
        include: regular expressions searched in parameter names (of a standardized weight, also in the name that it
            had); a match rotates though it is an embedding, in a task
            head, a LoRA B, or in a module class with a forward of its own. What is not known to be a weight matrix,
            or has no direction to turn, still does not.
        exclude: regular expressions; a match does not rotate. Wins over ``include``.
        embeddings: rotate ``nn.Embedding`` weights (a neuron is a token's row) and what is tied to them.
        heads: rotate new task heads.
        multipliers: regular expression to a factor on the target angle. The last that matches a parameter counts.

    Raises:
        ValueError: for a pattern that is no regular expression or matches no parameter, and for a multiplier that is
            not a positive number or whose pattern matches nothing that rotates.
    """
    factors = dict(multipliers or {})
    for pattern, factor in factors.items():
        if not 0 < factor < math.inf:
            raise ValueError(f"Invalid multiplier: {pattern!r}: {factor} (must be a finite number > 0)")
    includes, excludes = _compile(model, "include", include), _compile(model, "exclude", exclude)
    scaled = list(zip(_compile(model, "multipliers", tuple(factors)), factors.values(), strict=True))
    new = frozenset() if heads else _task_heads(model)
    entries = []
    for name, parameter, owners in _owners(model):
        in_head = not heads and (parameter in new or any(HEAD_NAMES.match(owner.path) for owner in owners))
        stored, reason = _decide(parameter, owners, in_head, embeddings, force=_matches(includes, name))
        if _matches(excludes, name):
            stored, reason = (), "excluded"
        scale = next((factor for pattern, factor in reversed(scaled) if stored and _matches([pattern], name)), 1.0)
        module_type = type_before_parametrizations(owners[0].module).__name__
        entries.append(PlannedParameter(name, parameter, module_type, stored, reason, scale))
    for compiled, _ in scaled:
        if not any(entry.rotates and _matches([compiled], entry.name) for entry in entries):
            raise ValueError(f"multipliers: {compiled.pattern!r} matches nothing that rotates")
    return RotationPlan(tuple(entries))


@dataclass(frozen=True)
class _Owner:
    """A place where a parameter is used: tied parameters have several."""

    path: str
    module: nn.Module
    layout: Layout


def _decide(
    parameter: nn.Parameter, owners: list[_Owner], in_head: bool, embeddings: bool, force: bool
) -> tuple[tuple[int, ...], str]:
    """Neuron dims (empty: does not rotate) and the reason."""
    obstacle = _obstacle(parameter, owners)
    if obstacle is not None:
        return (), obstacle
    objection = None if force else _objection(owners, in_head, embeddings)
    if objection is not None:
        return (), objection
    reason = "included" if force else "weight matrix" if len(owners) == 1 else "tied weight matrix"
    if is_zero(parameter):
        # A matter of values, so it must not decide: a run that is resumed finds others, and has to plan the same.
        reason += ", zero now: neurons that start at 0 take the plain step"
    return owners[0].layout.neuron_dims, reason


def _obstacle(parameter: nn.Parameter, owners: list[_Owner]) -> str | None:
    """What keeps a parameter from rotating whatever the user asks for."""
    if is_lazy(parameter):
        return "not initialized yet"
    if parameter.ndim < 2:
        return f"{parameter.ndim} dims"
    if parameter.dtype not in DTYPES:
        return f"quantized or not real ({str(parameter.dtype).removeprefix('torch.')})"
    dims = {owner.layout.neuron_dims for owner in owners}
    if len(dims) > 1 or dims == {()}:
        return owners[0].layout.reason if len(dims) == 1 else UNKNOWN
    fan_in = parameter.numel() // max(1, math.prod(parameter.shape[dim] for dim in owners[0].layout.neuron_dims))
    if fan_in < MIN_FAN_IN:
        return f"fan-in {fan_in} is below {MIN_FAN_IN}"
    return None


def is_zero(parameter: Tensor) -> bool:
    """Whether every entry is 0, which on the meta device is not known."""
    if parameter.device.type == "meta":
        return False
    size: Any = parameter.detach().abs().sum()
    # A sharded tensor is zero if every rank's part is.
    return not (size.full_tensor() if hasattr(size, "full_tensor") else size)


def _objection(owners: list[_Owner], in_head: bool, embeddings: bool) -> str | None:
    """What keeps a parameter from rotating unless the user asks for it."""
    if not embeddings and any(isinstance(owner.module, nn.Embedding) for owner in owners):
        return "embedding" if len(owners) == 1 else "tied to an embedding"
    if any("lora_B" in owner.path.split(".") for owner in owners):
        return "LoRA B"  # zero at the start, but by its name, so that a resumed run plans the same
    if in_head:
        return "task head"
    return next((owner.layout.reason for owner in owners if owner.layout.reason), None)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[_Owner]]]:
    """Every parameter once, under its first name, with each place that holds it."""
    uses: dict[nn.Parameter, list[_Owner]] = {}
    # peft gives stacked experts one adapter, with the experts' rows side by side along a dim of no plain meaning.
    fused = tuple(f"{path}." for path, module in model.named_modules() if type(module).__name__ == "ParamWrapper")
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            path = f"{prefix}.{name}" if prefix else name
            adapter = fused and any(path.startswith(f"{outer}lora_") for outer in fused)
            holder, leaf = _holder(model, prefix, module, name)
            stored = Layout(reason="adapter of stacked experts") if adapter else layout(holder, leaf)
            uses.setdefault(parameter, []).append(_Owner(path, holder, stored))
    for name, parameter in model.named_parameters():
        yield name, parameter, uses[parameter]


def _holder(model: nn.Module, path: str, module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that uses a parameter, and as what: not the parametrization in between, if neurons stay in place."""
    if not isinstance(module, ParametrizationList) or not hasattr(module[0], "neuron_dims"):
        return module, name
    path, _, leaf = path.rpartition(".")
    return model.get_submodule(path.removesuffix("parametrizations").removesuffix(".")), leaf


def _task_heads(model: nn.Module) -> frozenset[nn.Parameter]:
    """What models for tasks with labels hold outside their pretrained body, and the pooler that only feeds it.

    No normalization follows these, so their norms set the scale of the logits, which fine-tuning has to find.
    Checkpoints often come with a pooler that was never trained: held at its small norm it would cap the logits.
    """
    heads: set[nn.Parameter] = set()
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        labels, dense = (tasks.search(type(module).__name__) for tasks in (LABEL_TASKS, DENSE_TASKS))
        body = module.base_model
        if labels:
            heads.update(set(module.parameters()) - set(body.parameters()))
            heads.update(parameter for name, parameter in body.named_parameters() if name.startswith("pooler."))
        named = any(HEAD_NAMES.match(name) for name, _ in module.named_parameters())
        if (labels or dense) and not named and heads.isdisjoint(module.parameters()):
            heads.update(_last_layers(module))
    return frozenset(heads)


def _last_layers(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Weights with a neuron for each label: in each of the parts beside the body the last or, if there are none, the
    last in the body."""
    timm: Any = getattr(model, "timm_model", None)
    if timm is not None:
        yield from timm.get_classifier().parameters()
        return
    labels = getattr(model.config, "num_labels", 0)
    last: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        dims, weight = layout(module, "weight").neuron_dims, getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not dims or isinstance(module, nn.Embedding):
            continue
        if math.prod(weight.shape[dim] for dim in dims) == labels:
            last[path.split(".")[0]] = weight
    beside = [weight for part, weight in last.items() if part != model.base_model_prefix]
    yield from beside or last.values()


def _compile(model: nn.Module, argument: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r} must be a sequence of regular expressions, not one string")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{argument}: {pattern!r} is not a regular expression ({error})") from None
        if not any(_matches(compiled[-1:], name) for name, _ in model.named_parameters()):
            raise ValueError(f"{argument}: {pattern!r} matches no parameter of {type(model).__name__}")
    return compiled


def _matches(patterns: list[re.Pattern[str]], name: str) -> bool:
    plain = re.sub(r"(^|\.)parametrizations\.([^.]+)\.original$", r"\1\2", name)
    return any(pattern.search(each) for pattern in patterns for each in (name, plain))
