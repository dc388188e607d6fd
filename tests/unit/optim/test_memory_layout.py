"""How weights, gradients and moments lie in memory makes no difference to a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Builder, each_backend, each_optimizer, make, noise, train

LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((5, 7), lambda weight: weight.T.contiguous().T),
    "every other column": ((5, 7), lambda weight: weight.repeat_interleave(2, dim=1)[:, ::2]),
    "channels last": ((4, 3, 2, 5), lambda weight: weight.contiguous(memory_format=torch.channels_last)),
    "channels last 3d": ((4, 3, 2, 2, 2), lambda weight: weight.contiguous(memory_format=torch.channels_last_3d)),
}


@each_backend
@each_optimizer
@pytest.mark.parametrize("neuron_dims", [(0,), (1,)], ids=str)
@pytest.mark.parametrize(("shape", "laid_out"), LAYOUTS.values(), ids=LAYOUTS)
def test_memory_layout_makes_no_difference(
    shape: tuple[int, ...],
    laid_out: Callable[[Tensor], Tensor],
    neuron_dims: tuple[int, ...],
    build: Builder,
    backend: str,
) -> None:
    # Two of a shape, for foreach to stack.
    params = [nn.Parameter(laid_out(noise(*shape, seed=seed))) for seed in range(2)]
    twins = [nn.Parameter(noise(*shape, seed=seed)) for seed in range(2)]
    strides = params[0].stride()
    assert strides != twins[0].stride()
    for each in (params, twins):
        train(make(build, [{"params": each, "neuron_dims": neuron_dims}], backend=backend), each, range(5))
    # Sums run in another order.
    torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-12)
    assert params[0].stride() == strides


@each_backend
@each_optimizer
def test_moments_and_gradients_may_lie_otherwise_than_the_weight(build: Builder, backend: str) -> None:
    shape, laid_out = LAYOUTS["transposed"]
    params, twins = [nn.Parameter(laid_out(noise(*shape)))], [nn.Parameter(noise(*shape))]
    optimizer, twin = (make(build, each, backend=backend) for each in (params, twins))
    train(twin, twins, range(1))
    with torch.no_grad():
        params[0].copy_(twins[0])
    optimizer.load_state_dict(twin.state_dict())
    for each, its in ((optimizer, params), (twin, twins)):
        its[0].grad = noise(*shape, seed=7)
        each.step()
    # Sums run in another order.
    torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-12)
