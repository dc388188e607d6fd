"""``standardize(model)`` and ``fold(model)``: from plain modules to standardized ones, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from hf_rotational.neurons import PlannedParameter, is_zero, plan
from hf_rotational.standardize.parametrization import MODES, Standardization, standardization_of
from hf_rotational.standardize.report import StandardizationReport, layer_report, left_alone
from hf_rotational.standardize.state import (
    PARAMETRIZATIONS,
    PlainForm,
    load_plain,
    plain_form,
    save_plain,
    standardized_weights,
)

logger = logging.get_logger(f"transformers.{__name__}")

Model = TypeVar("Model", bound=nn.Module)

READS_ONCE = (nn.Linear, nn.Embedding, _ConvNd, Conv1D)
"""Modules whose forward reads a weight once; for the others it is kept until the forward ends."""

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
"""Names of classes that keep an account of a model's parameters."""

SAVE_INSTEAD = "save it, which writes plain weights, and load those"


@overload
def standardize(
    model: Model,
    mode: str = ...,
    *,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    embeddings: bool = ...,
    dry_run: Literal[False] = ...,
) -> Model: ...


@overload
def standardize(
    model: nn.Module,
    mode: str = ...,
    *,
    include: Sequence[str] = ...,
    exclude: Sequence[str] = ...,
    embeddings: bool = ...,
    dry_run: Literal[True],
) -> StandardizationReport: ...


def standardize(
    model: nn.Module,
    mode: str = "function_preserving",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    dry_run: bool = False,
) -> nn.Module | StandardizationReport:
    """Gives the neurons of a model's weights gains of their own, in place; call it before making the optimizer.

    Each weight becomes a parametrization (``torch.nn.utils.parametrize``) that computes it from a tensor of its shape
    and from one or two parameters per neuron. Unless the mode is ``"gain"``, all that matters of that tensor is the
    direction of its neurons: weight decay on it sets how fast they turn, not how large weights are. ``state_dict()``
    and ``save_pretrained()`` go on to hold plain weights under plain names; :func:`fold` makes the modules plain again.

    Standardized are the weight matrices, convolutions and stacked experts that :func:`~hf_rotational.plan` knows, task
    heads among them, along the dims that index their neurons. Left as they are: embeddings and what is tied to them,
    frozen, quantized and zero weights, LoRA's B, weights with another parametrization, and what ``plan`` does not know.

    Args:
        model: the model, on its device, before DDP, FSDP or ``torch.compile`` wrap it.
        mode: ``"function_preserving"``: mean and scale of each neuron become parameters, and outputs stay what they
            are. ``"drop_mean"``: weight standardization as published (arXiv 1903.10520), with gains that start at the
            scale the neurons have; outputs change, by how much a dry run tells. ``"gain"``: a gain alone, from 1.
        include, exclude: regular expressions searched in parameter names, as in :func:`~hf_rotational.plan`.
        embeddings: standardize ``nn.Embedding`` weights (a neuron is a token's row) and what is tied to them, too.
        dry_run: change nothing, and report per weight how much it and its outputs would change.

    Returns:
        The model; with ``dry_run`` a report that prints as a table.

    Raises:
        ValueError: for an unknown mode, a pattern as in ``plan``, a model with nothing to standardize or standardized
            in another mode, one that is wrapped or sharded already, and weights without values (on the meta device).
    """
    if mode not in MODES:
        raise ValueError(f"Invalid mode: {mode!r} (must be one of {', '.join(MODES)})")
    _refuse_wrapped(model, "standardize", "standardize it before")
    modes = {standardization.mode for standardization in _standardizations(model)}
    if modes - {mode}:
        raise ValueError(f"Invalid mode: {mode!r}: the model is standardized with {modes.pop()!r} (fold it first)")
    owners = _owners(model)
    entries = plan(model, include=include, exclude=exclude, embeddings=embeddings, heads=True)
    reasons = [_obstacle(entry, owners.get(entry.parameter, [])) for entry in entries]
    chosen = [entry for entry, reason in zip(entries, reasons, strict=True) if reason is None]
    for entry in chosen:
        _check_values(entry)
    if dry_run or not (chosen or modes):
        report = StandardizationReport(
            mode,
            tuple(
                layer_report(entry, mode) if reason is None else left_alone(entry, reason)
                for entry, reason in zip(entries, reasons, strict=True)
            ),
        )
        if dry_run:
            return report
        raise ValueError(f"No parameter of {type(model).__name__} can be standardized:\n{report}")
    for entry in chosen:
        _register(owners[entry.parameter], entry, mode)
    _keep_ties(model)
    logger.info(f"Standardized {len(chosen)} weights of {type(model).__name__} (mode={mode!r}).")
    return model


def fold(model: Model) -> Model:
    """Makes a standardized model plain, in place: its own modules, parameters and names, and the weights it computes.

    A model that is not standardized stays as it is. An optimizer that holds the parameters must be made anew.

    Raises:
        ValueError: naming the weight, and nothing has been changed, if the model is sharded or wrapped in DDP, another
            parametrization was put on top of a weight, or a weight is tied to a module outside of ``model``.
    """
    _refuse_wrapped(model, "fold", SAVE_INSTEAD)
    found = [
        (f"{path}.{name}" if path else name, module, name, computed, standardization)
        for path, module in model.named_modules()
        for name, computed, standardization in standardized_weights(module)
    ]
    inside = Counter(standardization for *_, standardization in found)
    for full_name, _, _, computed, standardization in found:
        reason = (
            f"it is sharded ({SAVE_INSTEAD})"
            if hasattr(computed.original, "placements")
            else "another parametrization was put on top of it (remove that first)"
            if len(computed) > 1
            else "a module outside of this one is tied to it (fold the whole model)"
            if inside[standardization] < standardization.owners
            else None
        )
        if reason:
            raise ValueError(f"Cannot fold {full_name}: {reason}")
    with torch.no_grad():
        weights = {computed: parts.weight(computed.original) for *_, computed, parts in found}
    for _, module, name, computed, _ in found:
        _unregister(module, name, weights[computed])
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            vars(module).pop("tie_weights", None)
    return model


def is_standardized(model: nn.Module) -> bool:
    """Whether any weight of the model is standardized."""
    return any(True for _ in _standardizations(model))


def _standardizations(model: nn.Module) -> Iterator[Standardization]:
    return (module for module in model.modules() if isinstance(module, Standardization))


def _refuse_wrapped(model: nn.Module, action: str, remedy: str) -> None:
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS:
                raise ValueError(f"Cannot {action} a model that {cls.__name__} has taken over ({remedy})")


def _owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Modules that hold each parameter, and under which name."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((module, name))
    return owners


def _obstacle(entry: PlannedParameter, owners: list[tuple[nn.Module, str]]) -> str | None:
    """Why a parameter stays as it is; None if it is standardized."""
    if any(standardization_of(module) for module, _ in owners):
        return "standardized already"
    if not entry.rotates:
        return entry.reason
    if not entry.parameter.requires_grad:
        return "frozen"
    if is_zero(entry.parameter):
        return "zero at the start"
    if any(isinstance(module, nn.Embedding) and (module.sparse or module.max_norm) for module, _ in owners):
        return "embedding whose rows are changed one by one (sparse or max_norm)"
    return None


def _check_values(entry: PlannedParameter) -> None:
    if hasattr(entry.parameter, "placements"):
        raise ValueError(f"Cannot standardize {entry.name}: it is sharded (standardize before sharding the model)")
    if entry.parameter.is_meta:
        raise ValueError(f"Cannot standardize {entry.name}: it is on the meta device (load its values first)")


def _register(owners: list[tuple[nn.Module, str]], entry: PlannedParameter, mode: str) -> None:
    """Parametrizes a weight; modules that share it share what computes it."""
    standardization = Standardization(entry.parameter, entry.neuron_dims, mode, owners=len(owners))
    shared = None
    for module, name in owners:
        if plain_form(module) is None:
            vars(module)["_plain_form"] = PlainForm(tuple(module._parameters), _hooks(module))
        register_parametrization(module, name, standardization)
        parametrizations = _parametrizations(module)
        shared = parametrizations[name] if shared is None else shared
        parametrizations[name] = shared


def _hooks(module: Any) -> tuple[RemovableHandle, ...]:
    handles = module.register_state_dict_post_hook(save_plain), module.register_load_state_dict_pre_hook(load_plain)
    if isinstance(module, READS_ONCE):
        return handles
    return (*handles, module.register_forward_pre_hook(_hold), module.register_forward_hook(_release, always_call=True))


def _parametrizations(module: nn.Module) -> Any:
    """The ``ModuleDict`` that torch keeps them in."""
    return module._modules[PARAMETRIZATIONS]


def _hold(module: nn.Module, args: object) -> None:
    """Computes a module's weights once for all of its forward: a loop over experts reads the stack in each round."""
    if not torch.compiler.is_compiling():  # the compiler finds out by itself
        for _, computed, standardization in standardized_weights(module):
            standardization.held = computed()


def _release(module: nn.Module, args: object, output: object) -> None:
    for *_, standardization in standardized_weights(module):
        standardization.held = None


def _unregister(module: nn.Module, name: str, weight: Tensor) -> None:
    """Makes a weight plain, in the parameter that it came from.

    Torch's ``remove_parametrizations`` would delete the property from a class that copies of the module share.
    """
    parametrizations, cls = _parametrizations(module), type(module)
    parameter = parametrizations[name].original
    parameter.grad, parameter.data = None, weight
    del parametrizations[name]
    if parametrizations:
        module.__class__ = type(cls.__name__, cls.__bases__, {k: v for k, v in vars(cls).items() if k != name})
    else:
        module.__class__ = cls.__bases__[0]
        del module._modules[PARAMETRIZATIONS]
    module.register_parameter(name, parameter)
    form = plain_form(module)
    if form is not None and not any(standardized_weights(module)):
        for name in form.order:
            module._parameters[name] = module._parameters.pop(name)
        for handle in form.handles:
            handle.remove()
        del vars(module)["_plain_form"]


def _keep_ties(model: nn.Module) -> None:
    """Keeps ``tie_weights()`` from tying, once more, what is tied by sharing what computes it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _own_ties(module) != module.all_tied_weights_keys:
            vars(module)["tie_weights"] = partial(_tie_others, module)


def _tie_others(model: PreTrainedModel, missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
    # Never recomputed: the names that it is computed from have changed.
    ties, model.all_tied_weights_keys = model.all_tied_weights_keys, _own_ties(model)
    try:
        type(model).tie_weights(model, missing_keys=missing_keys, recompute_mapping=False)
    finally:
        model.all_tied_weights_keys = ties


def _own_ties(model: PreTrainedModel) -> dict[str, str]:
    """Ties that are not between standardized weights: names of targets to those of sources."""
    ties: dict[str, str] = model.all_tied_weights_keys
    return {target: source for target, source in ties.items() if not _is_computed(model, target)}


def _is_computed(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return any(leaf == own for own, *_ in standardized_weights(model.get_submodule(path)))
