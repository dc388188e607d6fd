"""The CUDA kernel's side that needs no ``triton``: which tensors it steps, and whether it can be had."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from packaging.version import Version
from torch import Tensor, nn

from hf_rotational.optim.gains import learns
from hf_rotational.optim.groups import neuron_span
from hf_rotational.optim.inner import SGD, Adam, AdamW, Group, Inner, Lion, State
from hf_rotational.optim.kernels.cpu import layout_of
from hf_rotational.optim.sharding import alone, is_sharded, local, local_as, shard_number, split_over
from hf_rotational.optim.state import keep, state_here
from hf_rotational.optim.step import Step, check_dense

DEVICE = "cuda"
OLDEST = "3.4"
"""Version of triton that compiles the kernel."""
INNERS: tuple[type[Inner], ...] = (AdamW, Adam, SGD, Lion)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why the kernel cannot be used, or ``None`` if it can."""
    try:
        import triton
    except ImportError as error:
        return f"it needs the package triton: {error}"
    if Version(triton.__version__).release < Version(OLDEST).release:
        return f"it needs triton {OLDEST} or newer, and {triton.__version__} is installed"
    return None


def step(
    inner: Inner,
    groups: list[Group],
    left: list[list[Tensor]],
    states: Mapping[Tensor, State],
    target_rotation: Callable[[Group], float],
) -> list[list[Tensor]]:
    """Takes the step of every parameter with ``backend="fused"`` that the kernel can, tensor by tensor where state is
    still to be made.

    Args:
        inner: the optimizer's.
        groups: its groups.
        left: the parameters of each that are to be stepped.
        states: of the parameters.
        target_rotation: angle of a group, in radians per step.

    Returns:
        The parameters of each group that are left.

    Raises:
        RuntimeError: for a sparse gradient, and if ``triton`` is missing.
    """
    if type(inner) not in INNERS or all(group["backend"] != "fused" for group in groups):
        return left
    places = {parameter: place for place, parameter in enumerate(p for group in groups for p in group["params"])}
    rest: list[list[Tensor]] = []
    ready: list[tuple[Step, Tensor]] = []
    for group, parameters in zip(groups, left, strict=True):
        rest.append([])
        steps: dict[tuple[int, ...], Step] = {}
        for parameter in parameters:
            dims = neuron_span(parameter, group)
            if not takes(parameter, group, dims):
                rest[-1].append(parameter)
            elif parameter.grad is not None:
                if reason := unavailable():
                    raise RuntimeError(f"backend='fused' on {DEVICE}: {reason}. backend='foreach' needs nothing")
                if dims not in steps:
                    steps[dims] = Step(inner, group, dims, target_rotation(group) if dims else 0.0)
                if is_ready(parameter, states[parameter], inner, group, dims):
                    ready.append((steps[dims], parameter))
                else:
                    alone(steps[dims].take([parameter], [states[parameter]], [places[parameter]]))
    if ready:
        _launch(ready, states, places)
    return rest


def takes(parameter: Tensor, group: Group, dims: tuple[int, ...]) -> bool:
    """Whether the kernel can step a parameter whose neurons span ``dims``, and is asked to."""
    if group["backend"] != "fused" or parameter.device.type != DEVICE or (dims and learns(group)):
        return False
    part = local(parameter.detach())
    layout = layout_of(parameter, dims)
    return (
        layout is not None
        and 1 in (layout[1], layout[3])
        and part.dtype in DTYPES
        and part.is_contiguous()
        and part.numel() > 0
        and (is_sharded(parameter) or type(parameter) in (Tensor, nn.Parameter))
        and type(part) is Tensor
        and not split_over(parameter, dims)
        and not torch.compiler.is_compiling()
    )


def is_ready(parameter: Tensor, state: State, inner: Inner, group: Group, dims: tuple[int, ...]) -> bool:
    """Whether a parameter's state has all that a step needs, where and as the kernel reads it."""
    names = (*inner.buffers(group), *(("norm", "update_norm_sq") if dims else ()))
    if "step" not in state or state.get("centered") is False or not state.keys() >= set(names):
        return False
    return all(
        part.dtype == torch.float32 and part.device == parameter.device and part.is_contiguous()
        for part in (local(state[name]) for name in names)
    )


def _launch(ready: list[tuple[Step, Tensor]], states: Mapping[Tensor, State], places: dict[Tensor, int]) -> None:
    from hf_rotational.optim.kernels.triton import Job, take

    here = [state_here(states[parameter], parameter) for _, parameter in ready]
    seeds = [(shard_number(parameter) << 16) + places[parameter] for _, parameter in ready]
    take(
        Job(step, local(parameter.detach()), _grad(parameter), state, seed)
        for (step, parameter), state, seed in zip(ready, here, seeds, strict=True)
    )
    for (step, parameter), state in zip(ready, here, strict=True):
        keep(state, states[parameter], parameter, step.dims)
    # Or a graph could be walked back with changed weights, unnoticed.
    torch.autograd.graph.increment_version([parameter for _, parameter in ready])


def _grad(parameter: Tensor) -> Tensor:
    check_dense(parameter)
    assert parameter.grad is not None
    grad = local_as(parameter.grad, parameter)
    return (grad if grad.dtype in DTYPES else grad.to(parameter.dtype)).contiguous()
