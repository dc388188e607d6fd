"""Optimizer state: what of it is on this rank, how it is kept, and what of another optimizer's can be taken over."""

from __future__ import annotations

from torch import Tensor

from hf_rotational.optim.inner import Group, Inner, State
from hf_rotational.optim.precision import COMPENSATION, compute_dtype
from hf_rotational.optim.sharding import is_sharded, local, placed


def state_here(state: State, parameter: Tensor) -> State:
    """The part of a parameter's state that is on this rank: the state itself, unless the parameter is sharded."""
    if not is_sharded(parameter):
        return state
    return {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}


def keep(here: State, state: State, parameter: Tensor, dims: tuple[int, ...]) -> None:
    """Keeps what a step has made or exchanged of :func:`state_here`, as DTensors where the parameter is one."""
    if here is state:
        return
    for name in state.keys() - here.keys():
        del state[name]
    for name, value in here.items():
        if isinstance(value, Tensor) and value.ndim > 0:
            if name in state and local(state[name]) is value:
                continue  # changed in place
            value = placed(value, parameter, dims if _per_neuron(name) else ())
        state[name] = value


def take_tensors(state: State, source: State, parameter: Tensor) -> None:
    """Copies tensors into a parameter's state, in the dtype they are kept in, on its device."""
    for name, value in source.items():
        if isinstance(value, Tensor):
            # Counters and the like are scalars; they and Kahan's remainder are in the dtype they should be in.
            own_dtype = name == COMPENSATION or value.ndim == 0 or not value.is_floating_point()
            dtype = value.dtype if own_dtype else compute_dtype(parameter)
            device = value.device if name.endswith("step") else parameter.device
            # A copy, so that two optimizers that load one state do not share it.
            state[name] = value.to(device, dtype, copy=True)


def check_state(state: State, parameter: Tensor, group: Group, inner: Inner, optimizer: str) -> None:
    """Raises ``ValueError`` unless a state has the moments the inner continues, of the parameter's shape."""
    if not state:
        return
    missing = [name for name in inner.buffers(group) if state.get(name) is None]
    if missing:
        raise ValueError(
            f"Invalid state: it has {', '.join(state)} but no {', '.join(missing)}, so it is not of an optimizer "
            f"whose moments {optimizer} could continue"
        )
    for name in inner.buffers(group):
        if state[name].shape != parameter.shape:
            raise ValueError(
                f"Invalid state: {name} has shape {tuple(state[name].shape)} for a parameter of shape "
                f"{tuple(parameter.shape)}, so it is of another model, or of an optimizer with other groups"
            )


def _per_neuron(name: str) -> bool:
    return name in ("norm", "update_norm_sq") or name.split("_")[0] in ("gain", "mean")
