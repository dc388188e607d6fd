"""State dicts of standardized models: plain ones for everyone, raw ones for an exact resume."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from hf_rotational.standardize.parametrization import Standardization, standardization_of

PARAMETRIZATIONS = "parametrizations"


@dataclass(frozen=True)
class PlainForm:
    """What a module with standardized weights must remember of what it was before."""

    order: tuple[str, ...]
    """Names of its parameters, in their order."""
    handles: tuple[RemovableHandle, ...]
    """Of the hooks that keep its state dicts plain."""


def plain_form(module: nn.Module) -> PlainForm | None:
    """What a module has been told to remember; None if it has no standardized weight."""
    return vars(module).get("_plain_form")


_raw: ContextVar[bool] = ContextVar("raw", default=False)


@contextmanager
def raw_state_dicts() -> Iterator[None]:
    """Inside, ``state_dict()`` of a standardized model holds what its weights are computed from, and not the weights.

    That is what to save for a resume through ``torch.distributed.checkpoint`` (FSDP2), whose functions expect the names
    of the parameters::

        with raw_state_dicts():
            state = get_model_state_dict(model)

    Loading tells by the names which of the two it is given.
    """
    token = _raw.set(True)
    try:
        yield
    finally:
        _raw.reset(token)


def raw_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that standardized weights are computed from, by their names in ``model.named_parameters()``.

    ``model.state_dict()`` holds the weights themselves, which do not determine these: weights say nothing of the scale
    and the mean that their ``V`` has by now. An exact resume takes both.

    Returns:
        Tensors that share the parameters' memory, DTensors if the model is sharded. None if nothing is standardized.
    """
    names = [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if standardization_of(module) is not None
        for name, _ in module.named_parameters()
    ]
    with raw_state_dicts():
        state = model.state_dict() if names else {}
    return {name: state[name] for name in names}


@torch.no_grad()
def load_raw_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what :func:`raw_state_dict` returned, bit for bit, into a model that was standardized in the same way.

    Whole tensors are sharded as the model is.

    Raises:
        ValueError: if names or shapes differ; nothing has been changed then.
    """
    own = raw_state_dict(model)
    for names, what in ((own.keys() - state.keys(), "lacks"), (state.keys() - own.keys(), "has unknown")):
        if names:
            which = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(
                f"Invalid state: it {what} {which} (must be the raw_state_dict of a model that was standardized in the "
                f"same way as this {type(model).__name__})"
            )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"Invalid state: {name} of shape {tuple(state[name].shape)} (must be {tuple(tensor.shape)})"
            )
    for name, tensor in own.items():
        tensor.copy_(_sharded_as(tensor, state[name]))


def _sharded_as(parameter: Tensor, value: Tensor) -> Tensor:
    if not hasattr(parameter, "placements") or hasattr(value, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements)


def standardized_weights(module: nn.Module) -> Iterator[tuple[str, ParametrizationList, Standardization]]:
    """Names of a module's own standardized weights, with what computes them."""
    # Not an attribute: peft's wrappers pass on those of the module inside.
    parametrizations: Any = module._modules.get(PARAMETRIZATIONS) or {}
    for name, computed in parametrizations.items():
        standardization = standardization_of(computed)
        if standardization is not None:
            yield name, computed, standardization


def save_plain(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook after ``module.state_dict()``: puts the weights in the place of what they are computed from."""
    if _raw.get():
        return
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for name, computed, standardization in standardized_weights(module):
        if len(computed) > 1:
            continue  # someone else's parametrization on top, which its keys belong to
        raw = [own.pop(key) for key in list(own) if key.startswith(f"{prefix}{PARAMETRIZATIONS}.{name}.")]
        weight = _saved(standardization, state)
        if weight is None:
            with torch.set_grad_enabled(any(tensor.requires_grad for tensor in raw)):  # keep_vars=True asks for a graph
                weight = standardization.weight(computed.original)
            standardization.saved = weakref.ref(weight)
        own[prefix + name] = weight
    form = plain_form(module)
    first = [prefix + name for name in (form.order if form else ()) if prefix + name in own]
    state.update({key: own[key] for key in (*first, *own)})


def _saved(standardization: Standardization, state: Mapping[str, Any]) -> Tensor | None:
    """The weight, if a tied module has put it there already: that it is the same tensor is how savers see a tie."""
    weight = None if standardization.saved is None else standardization.saved()
    return weight if weight is not None and any(value is weight for value in state.values()) else None


def load_plain(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before ``module.load_state_dict()``: takes plain weights apart, each as if it were standardized now."""
    for name, computed, standardization in standardized_weights(module):
        weight = state.get(prefix + name)
        if weight is not None and weight.shape == computed.original.shape:
            del state[prefix + name]
            for part, tensor in standardization.split(weight).items():
                state[f"{prefix}{PARAMETRIZATIONS}.{name}.{part}"] = tensor
