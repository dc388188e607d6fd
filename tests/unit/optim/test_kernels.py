"""The CPU kernel (backend "fused") against the formulas in float64, against itself, and against eager."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_rotational import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD
from hf_rotational.optim.kernels import build as build_module
from hf_rotational.optim.kernels.base import layout_of
from hf_rotational.optim.kernels.build import unavailable
from hf_rotational.optim.kernels.cpu import FusedStep
from tests.helpers import WRITTEN_OUT, copies, exactly_equal, make, noise, parameters, train
from tests.reference import rotational as reference

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no kernel on this machine: {unavailable()}")

BETAS, LION_BETAS, DECAY, ANGLE = (0.9, 0.95), (0.9, 0.99), 0.1, 0.02
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[[], reference.Direction]]] = {
    "adamw": (partial(RotationalAdamW, betas=BETAS), lambda: reference.adam(BETAS)),
    "adam": (partial(RotationalAdam, betas=BETAS), lambda: reference.adam(BETAS, l2=DECAY)),
    "sgd": (RotationalSGD, lambda: reference.sgd(0.0)),
    "momentum": (partial(RotationalSGD, momentum=0.9), lambda: reference.sgd(0.9)),
    "nesterov": (partial(RotationalSGD, momentum=0.9, nesterov=True), lambda: reference.sgd(0.9, nesterov=True)),
    "dampening": (partial(RotationalSGD, momentum=0.9, dampening=0.5), lambda: reference.sgd(0.9, dampening=0.5)),
    "lion": (partial(RotationalLion, betas=LION_BETAS), lambda: reference.lion(LION_BETAS)),
}
# Shape, neuron_dims: rows, short and long; columns; experts of columns; a transposed convolution.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((5, 37), (0,)),
    "long rows": ((2, 1500), (0,)),
    "columns": ((37, 21), (1,)),
    "experts": ((2, 9, 5), (0, 2)),
    "transposed convolution": ((7, 5, 3, 3), (1,)),
}


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters each step by the kernel left to others."""
    left: list[int] = []
    step = FusedStep.step

    def watched(self: FusedStep, *arguments: Any) -> list[list[Tensor]]:
        rest = step(self, *arguments)
        left.append(sum(map(len, rest)))
        return rest

    monkeypatch.setattr(FusedStep, "step", watched)
    return left


def small_noise(*shape: int, seed: int = 0) -> Tensor:
    """Of the size of trained weights."""
    return (0.1 * noise(*shape, seed=seed)).float()


def as_rows(tensor: Tensor, neuron_dims: tuple[int, ...]) -> np.ndarray:
    """Neurons as rows, in float64, in the order of their dims."""
    rest = [dim for dim in range(tensor.ndim) if dim not in neuron_dims]
    return tensor.detach().double().permute(*neuron_dims, *rest).flatten(0, len(neuron_dims) - 1).flatten(1).numpy()


@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("shape", "neuron_dims"), SHAPES.values(), ids=SHAPES)
def test_equals_the_formulas(
    shape: tuple[int, ...], neuron_dims: tuple[int, ...], name: str, centering: str, steps_taken: list[int]
) -> None:
    build, direction = OPTIMIZERS[name]
    parameter = nn.Parameter(small_noise(*shape))
    start = as_rows(parameter, neuron_dims).copy()
    grads = [small_noise(*shape, seed=seed) for seed in range(1, 101)]
    group = {"params": [parameter], "neuron_dims": neuron_dims}
    optimizer = build([group], lr=1e-3, weight_decay=DECAY, rotation=ANGLE, centering=centering, backend="fused")
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    series = (as_rows(grad, neuron_dims) for grad in grads)
    expected = reference.rotate(start, series, direction(), [ANGLE] * 100, centering=centering)
    # A hundred roundings to 24 bits of entries below 0.5, in either direction.
    np.testing.assert_allclose(as_rows(parameter, neuron_dims), expected, rtol=0, atol=1e-6)
    assert steps_taken == [0] * 100


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"maximize": True}, {"transient_correction": True}])
@pytest.mark.parametrize("extra", [{"update_norm_decay": 0.3}, {"centering": "updates"}], ids=str)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_equals_eager_and_leaves_the_same_state(
    name: str, extra: dict[str, Any], options: dict[str, Any], steps_taken: list[int]
) -> None:
    both = [parameters(torch.float32) for _ in range(2)]
    fused, eager = (
        make(WRITTEN_OUT[name], params, backend=backend, **options, **extra)
        for params, backend in zip(both, ("fused", "eager"), strict=True)
    )
    for optimizer, params in ((fused, both[0]), (eager, both[1])):
        train(optimizer, params, range(5))
        train(optimizer, [None, params[1], None], range(5, 7))
        optimizer.zero_grad()
        train(optimizer, params, range(7, 12))
    # Twelve float32 steps on weights of size 1; Adam divides by a root that has its rounding too.
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=5e-6)
    for one, other in zip(*both, strict=True):
        found, expected = fused.state[one], eager.state[other]
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert steps_taken[0] == 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(2, 70),
    name=st.sampled_from(list(OPTIMIZERS)),
    columns=st.booleans(),
    offset=st.integers(0, 3),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e10]),
)
def test_every_shape_equals_the_formulas(
    rows: int, width: int, name: str, columns: bool, offset: int, scale: float
) -> None:
    build, direction = OPTIMIZERS[name]
    shape = (width, rows) if columns else (rows, width)
    neuron_dims = (1,) if columns else (0,)
    # A view that starts inside a cache line.
    memory = torch.zeros(rows * width + offset)
    parameter = nn.Parameter(memory[offset:].view(shape))
    parameter.data.copy_(small_noise(*shape))
    start = as_rows(parameter, neuron_dims).copy()
    grads = [scale * small_noise(*shape, seed=seed) for seed in range(1, 6)]
    group = {"params": [parameter], "neuron_dims": neuron_dims}
    optimizer = build([group], lr=1e-3, weight_decay=DECAY, rotation=ANGLE, rotational_eps=0.0, backend="fused")
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    if scale == 1e-30 and name in ("adamw", "adam"):
        assert parameter.isfinite().all()  # squares of these gradients are 0 in float32, whatever takes the step
        return
    series = (as_rows(grad, neuron_dims) for grad in grads)
    if scale == 1e-30 and "lion" not in name:
        return  # as are the squares of these updates
    expected = reference.rotate(start, series, direction(), [ANGLE] * 5, eps=0.0)
    # Two entries may point almost along their gradient, where the tangent loses half its digits.
    np.testing.assert_allclose(as_rows(parameter, neuron_dims), expected, rtol=0, atol=2e-5 if width < 5 else 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("centering", ["none", "updates"])
@pytest.mark.parametrize("columns", [False, True])
def test_odd_neurons_do_what_they_do_with_eager(columns: bool, centering: str, name: str) -> None:
    build, _ = OPTIMIZERS[name]
    start = small_noise(8, 40)
    start[1] = 0.0
    start[2] = 1e-42  # denormal
    grads = [small_noise(8, 40, seed=seed) for seed in range(1, 5)]
    grads[1][3, 5] = math.nan
    for grad in grads:
        grad[4] = 0.0
        grad[5] = start[5] if centering == "none" else 0.1  # radial, constant
        grad[6] = 1e-42
    found = {}
    for backend in ("fused", "eager"):
        parameter = nn.Parameter((start.T if columns else start).contiguous())
        group = {"params": [parameter], "neuron_dims": (1,) if columns else (0,)}
        optimizer = build([group], lr=1e-2, weight_decay=DECAY, rotation=0.05, centering=centering, backend=backend)
        for grad in grads:
            parameter.grad = (grad.T if columns else grad).clone().contiguous()
            optimizer.step()
        found[backend] = parameter.detach().T if columns else parameter.detach()
    # L2 and eps make directions of what the plain optimizers would not: only SGD's follow gradients.
    same = [0, 1, 3, 4, 7] if "adam" in name or name == "lion" else range(8)
    torch.testing.assert_close(found["fused"][same], found["eager"][same], rtol=1e-5, atol=2e-6, equal_nan=True)
    assert found["fused"][[0, 1, 4, 5, 6, 7]].isfinite().all()
    if name == "sgd":
        exactly_equal(found["fused"][[4, 5]], start[[4, 5]])


def trained(threads: int, **options: Any) -> list[Tensor]:
    """Parameters of many blocks, after a few steps on this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = [(700, 97), (50_001,), (97, 700), (3, 70_000)]
        params = [nn.Parameter(small_noise(*shape, seed=place)) for place, shape in enumerate(shapes)]
        groups = [{"params": params[:2]}, {"params": params[2:], "neuron_dims": (1,)}]
        train(make(RotationalAdamW, groups, backend="fused", **options), params, range(3))
    finally:
        torch.set_num_threads(before)
    return copies(params)


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(options: dict[str, Any]) -> None:
    once = trained(1, **options)
    for threads in (1, 2, 3):
        exactly_equal(trained(threads, **options), once)


def test_what_memory_does_not_hold_is_worked_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = trained(1)
    # Enough for the tables of columns alone.
    monkeypatch.setattr("hf_rotational.optim.kernels.cpu.SCRATCH", 70_000)
    torch.testing.assert_close(trained(2), plenty, rtol=0, atol=1e-7)


def test_denormals_stay() -> None:
    make(RotationalAdamW, [nn.Parameter(noise(3, 4, dtype=torch.float32))], backend="fused")
    assert float(torch.tensor([1e-42]) * 1.0) != 0
    tiny = nn.Parameter(torch.full((3,), 1e-42))
    tiny.grad = torch.full((3,), 1e-42)
    optimizer = RotationalSGD([tiny], lr=0.5, weight_decay=0.0, backend="fused")
    assert optimizer.step() is None  # a step of half the weight
    exactly_equal(tiny.detach(), torch.full((3,), 1e-42) - 0.5 * torch.full((3,), 1e-42))


def replace_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    for parameter in params:
        optimizer.state[parameter] = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in optimizer.state[parameter].items()
        }


def move_weights(optimizer: Any, params: list[nn.Parameter]) -> None:
    for parameter in params:
        parameter.data = parameter.data.clone()


def move_moments(optimizer: Any, params: list[nn.Parameter]) -> None:
    for parameter in params:
        optimizer.state[parameter]["exp_avg"].data = optimizer.state[parameter]["exp_avg"].clone()


def reload(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def stop_rotating(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["rotational"] = False


@pytest.mark.parametrize("change", [replace_state, move_weights, move_moments, reload, stop_rotating])
def test_changes_between_steps_are_seen(change: Callable[[Any, list[nn.Parameter]], None]) -> None:
    results = []
    for backend in ("fused", "eager"):
        params = parameters(torch.float32)
        optimizer = make(RotationalAdamW, params, backend=backend)
        train(optimizer, params, range(3))
        change(optimizer, params)
        train(optimizer, params, range(3, 6))
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-5, atol=2e-6)


def test_of_weights_that_became_fewer_the_others_stay() -> None:
    memory = noise(6, dtype=torch.float32)
    parameter = nn.Parameter(memory)
    optimizer = RotationalSGD([parameter], lr=0.1, backend="fused")
    for entries in (6, 6, 3):
        parameter.data, rest = memory[:entries], memory[entries:].clone()
        parameter.grad = torch.ones(entries)
        optimizer.step()
    exactly_equal(memory[3:], rest)


@pytest.mark.parametrize(("first", "then"), [("eager", "fused"), ("fused", "eager")])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_checkpoints_go_from_one_backend_to_the_other(name: str, first: str, then: str) -> None:
    params, expected = parameters(torch.float32), parameters(torch.float32)
    before, alone = (make(WRITTEN_OUT[name], each, backend=first) for each in (params, expected))
    train(before, params, range(4))
    train(alone, expected, range(8))
    after = make(WRITTEN_OUT[name], params, backend=then)
    saved = before.state_dict()
    for group in saved["param_groups"]:
        group["backend"] = then
    after.load_state_dict(saved)
    train(after, params, range(4, 8))
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=2e-6)


def test_gradients_of_any_layout_are_read(steps_taken: list[int]) -> None:
    params = [nn.Parameter(small_noise(6, 8)) for _ in range(2)]
    grad = small_noise(8, 6, seed=1).T
    params[0].grad, params[1].grad = grad, grad.contiguous()
    make(RotationalAdamW, params, backend="fused").step()
    exactly_equal(params[0], params[1])
    assert steps_taken == [0]


def test_a_graph_that_holds_weights_notices_the_step() -> None:
    parameter = nn.Parameter(small_noise(4, 5))
    loss = (parameter * parameter).sum()
    loss.backward(retain_graph=True)
    make(RotationalAdamW, [parameter], backend="fused").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("parameter", "options"),
    [
        (nn.Parameter(noise(4, 6)), {}),
        (nn.Parameter(noise(4, 6, dtype=torch.bfloat16)), {}),
        (nn.Parameter(noise(6, 4, dtype=torch.float32).T), {}),
        (nn.Parameter(noise(4, 6, dtype=torch.float32)), {"gains": "learned"}),
        (nn.Parameter(noise(4, 6, dtype=torch.float32)), {"centering": "learned"}),
    ],
    ids=["float64", "bfloat16", "transposed", "gains", "means"],
)
def test_what_the_kernel_does_not_have_runs_on_eager(
    parameter: nn.Parameter, options: dict[str, Any], steps_taken: list[int]
) -> None:
    twin = nn.Parameter(parameter.detach().clone())
    train(make(RotationalAdamW, [parameter], backend="fused", **options), [parameter], range(3))
    train(make(RotationalAdamW, [twin], backend="eager", **options), [twin], range(3))
    exactly_equal(parameter, twin)
    assert steps_taken[:3] == [1, 1, 1]


@pytest.mark.parametrize(
    ("shape", "dims", "layout"),
    [
        ((5, 7), (1,), (1, 1, 5, 7)),
        ((5, 7), (0,), (1, 5, 7, 1)),
        ((5, 7), (0, 1), (1, 1, 1, 35)),
        ((3, 5, 7), (1,), (3, 5, 7, 1)),
        ((5, 7, 2, 3), (0, 2, 3), (1, 5, 7, 6)),
        ((1, 5, 1, 7), (3,), (1, 1, 5, 7)),
        ((2, 3, 2, 3, 2, 3), (1, 3, 5), None),
        ((2, 3, 5000), (0, 2), None),
        ((6,), (), (1, 1, 1, 6)),
    ],
)
def test_layouts(shape: tuple[int, ...], dims: tuple[int, ...], layout: tuple[int, ...] | None) -> None:
    assert layout_of(torch.empty(shape), dims) == layout


def test_threads_that_would_have_nothing_to_do_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(small_noise(4, 8))
    optimizer = make(RotationalAdamW, [parameter], backend="fused")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    train(optimizer, [parameter], range(2))
    (kernel,) = (kernel for kernel in optimizer._kernels if isinstance(kernel, FusedStep))
    assert kernel._scratch.nbytes < 100_000


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a build that has not been tried."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    functions = (build_module.library, build_module.kernel, build_module.unavailable)
    for function in functions:
        function.cache_clear()
    yield tmp_path
    for function in functions:
        function.cache_clear()


@pytest.mark.parametrize("broken", ["no compiler", "cannot compile", "no cache", "no home"])
def test_without_a_kernel_auto_is_eager_and_fused_says_why(
    broken: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "no cache":
        (fresh_build / "hf_rotational").write_text("a file where the folder should be")
    elif broken == "no home":

        def no_home(path: Path) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", no_home)
    else:
        monkeypatch.setenv("CC", "/no/such/cc" if broken == "no compiler" else f"{sys.executable} -c 'import no_such'")
    params, twins = parameters(torch.float32), parameters(torch.float32)
    train(make(RotationalAdamW, params), params, range(3))
    train(make(RotationalAdamW, twins, backend="eager"), twins, range(3))
    exactly_equal(params, twins)
    with pytest.raises(ValueError, match=r"Invalid backend: 'fused' \(must be 'auto' or 'eager' on this machine: "):
        make(RotationalAdamW, params, backend="fused")


@pytest.mark.skipif(platform.system() == "Windows", reason="no C compiler by that name")
def test_processes_may_build_at_once(tmp_path: Path) -> None:
    program = "from hf_rotational.optim.kernels.build import kernel; kernel()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [path.suffix for path in (tmp_path / "hf_rotational").iterdir()] == [".so"]
