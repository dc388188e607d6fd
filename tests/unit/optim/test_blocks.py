"""Steps block by block: the same as on whole tensors, however these are cut, with temporaries that do not grow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hf_rotational import RotationalAdamW, RotationalSGD
from hf_rotational.optim import blocks
from hf_rotational.optim.blocks import panels
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.precision import ROUNDINGS
from tests.helpers import each_optimizer, exactly_equal, make, noise, train

Build = Callable[..., RotationalOptimizer]
# Shape, and which dims index neurons: rows, columns, both in a stack of matrices, the middle one.
TENSORS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((13, 37), (0,)),
    ((37, 13), (1,)),
    ((3, 11, 7), (0, 2)),
    ((5, 9, 4), (1,)),
]
each_tensor = pytest.mark.parametrize(("shape", "neuron_dims"), TENSORS, ids=str)
# Blocks of many neurons, of one, and of a part of one.
each_size = pytest.mark.parametrize(("block", "panel"), [(120, 200), (40, 80), (8, 40)], ids=str)


def trained(build: Build, start: list[Tensor], steps: int = 4, **options: Any) -> list[Any]:
    """Parameters and their states after some steps."""
    params = [nn.Parameter(tensor.clone()) for tensor in start]
    group = {"params": params, **{name: options.pop(name) for name in ("neuron_dims", "rotational") if name in options}}
    optimizer = make(build, [group], backend="eager", **options)
    train(optimizer, params, range(steps))
    return [(parameter.detach(), dict(optimizer.state[parameter])) for parameter in params]


def in_blocks(monkeypatch: pytest.MonkeyPatch, block: int, panel: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "PANEL", panel)


def assert_blocks_make_no_difference(
    monkeypatch: pytest.MonkeyPatch, block: int, panel: int, build: Build, start: list[Tensor], **options: Any
) -> None:
    whole = trained(build, start, **options)
    in_blocks(monkeypatch, block, panel)
    # Sums run in another order.
    torch.testing.assert_close(trained(build, start, **options), whole, rtol=1e-11, atol=1e-12, equal_nan=True)


@each_size
@each_tensor
@each_optimizer
def test_blocks_make_no_difference(
    build: Build,
    shape: tuple[int, ...],
    neuron_dims: tuple[int, ...],
    block: int,
    panel: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two of a shape, with a neuron without norm and one that becomes NaN.
    start = [noise(*shape, seed=seed) for seed in range(2)]
    start[0][tuple(1 if dim in neuron_dims else slice(None) for dim in range(len(shape)))] = 0.0
    start[1].view(-1)[-1] = math.nan
    assert_blocks_make_no_difference(monkeypatch, block, panel, build, start, neuron_dims=neuron_dims)


OPTIONS: list[dict[str, Any]] = [
    {"centering": "updates", "transient_correction": True},
    {"centering": "weights", "maximize": True},
    {"centering": "learned"},
    {"gains": "learned"},
    {"gains": "learned", "centering": "learned", "granularity": "tensor"},
    {"granularity": "tensor"},
    {"update_norm_decay": 0.0},
    {"rotational": False},
]


@each_tensor
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("build", [RotationalAdamW, RotationalSGD], ids=["AdamW", "SGD"])
def test_options_in_blocks(
    build: Build,
    options: dict[str, Any],
    shape: tuple[int, ...],
    neuron_dims: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = [noise(*shape, seed=seed) + 0.5 for seed in range(2)]
    assert_blocks_make_no_difference(monkeypatch, 40, 80, build, start, neuron_dims=neuron_dims, **options)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_in_blocks(dtype: torch.dtype, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows, whose sums do not depend on where they are cut, and which draw in the order of memory.
    start = [noise(64, 48, dtype=dtype, seed=seed) for seed in range(2)]
    whole = trained(RotationalAdamW, start, rounding=rounding)
    in_blocks(monkeypatch, 500, 1000)
    exactly_equal(trained(RotationalAdamW, start, rounding=rounding), whole)


@each_size
@each_tensor
def test_panels_hold_every_entry_once_and_whole_neurons(
    shape: tuple[int, ...], neuron_dims: tuple[int, ...], block: int, panel: int
) -> None:
    seen = torch.zeros(shape)
    dims = tuple(dim for dim in range(len(shape)) if dim not in neuron_dims)
    fan_in = math.prod(shape[dim] for dim in dims)
    for cuts in panels(shape, dims, block, panel):
        before = seen.clone()
        for cut in cuts:
            assert 0 < seen[cut].numel() <= block
            seen[cut] += 1
        here = (seen - before).sum(dims)
        assert set(here.unique().tolist()) <= {0.0, fan_in}
        # At least one neuron.
        assert here.sum() <= max(block, panel, fan_in)
    exactly_equal(seen, torch.ones(shape))


@pytest.mark.parametrize("neuron_dims", [(0,), (1,)], ids=["rows", "columns"])
def test_two_runs_are_the_same_bit_for_bit(neuron_dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks(monkeypatch, 500, 2000)
    start = [noise(64, 96, dtype=torch.float32, seed=seed) for seed in range(2)]
    first, second = (trained(RotationalAdamW, start, neuron_dims=neuron_dims) for _ in range(2))
    exactly_equal(first, second)


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most memory that was taken from torch's allocator at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    assert taken == 0, "all of it is given back"
    return peak


@pytest.mark.parametrize("backend", ["eager", "foreach"])
@pytest.mark.parametrize(
    ("group", "panel"),
    [({"neuron_dims": (0,)}, 0), ({"rotational": False}, 0), ({"neuron_dims": (1,)}, 1 << 17)],
    ids=["rows", "plain", "columns"],
)
def test_temporaries_are_of_blocks_not_of_tensors(
    group: dict[str, Any], panel: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, 1 << 14, panel)
    weights = [nn.Parameter(torch.ones(512, 1024)) for _ in range(2)]
    optimizer = RotationalAdamW([{"params": weights, **group}], backend=backend)
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.1)
    optimizer.step()  # makes the state
    most = panel + (4 << 14)
    assert 0 < peak_bytes(optimizer.step) < 4 * most
    assert most < weights[0].numel() / 2  # a temporary of a whole tensor would be too much
