"""Steps of the CUDA kernel in CUDA graphs, on a CPU in Triton's interpreter.

A graph is a list of launches with their arguments, which its replays repeat. Here it is kept as such: what is launched
while a graph is "captured" is put on a list and not run, and a replay runs the list. ``test_triton.py`` runs this file
in a process of its own, and captures a real graph where there is a GPU.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_rotational import RotationalAdamW, RotationalSGD
from hf_rotational.optim.kernels import cuda, triton
from tests.helpers import LR, ROTATIONAL, WRITTEN_OUT, copies, exactly_equal, gradient, make, noise, train
from tests.unit.optim.on_triton import FLOAT32, NEAR, float32, fused

pytest_plugins = ["tests.unit.optim.on_triton"]
# numpy, which the interpreter computes with, warns of what rows without a norm divide by.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SHAPES = [(5, 7), (1, 10_001), (40, 3), (6,)]  # rows, one that programs share, columns, a vector
RATES = [0.5, 1.0, 0.0, 0.7, 0.3, 0.2]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A context within which launches are put on the list that it gives."""

    @contextmanager
    def captured() -> Iterator[list[Callable[[], None]]]:
        graph: list[Callable[[], None]] = []

        class Kept:
            def __init__(self, kernel: Any) -> None:
                self.kernel = kernel

            def __getitem__(self, grid: tuple[int]) -> Any:
                return lambda *arguments, **options: graph.append(partial(self.kernel[grid], *arguments, **options))

        with monkeypatch.context() as within:
            within.setattr(torch.cuda, "is_initialized", lambda: True)
            within.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            for name in ("count_steps", "rotational_step"):
                within.setattr(triton, name, Kept(getattr(triton, name)))
            yield graph

    return captured


def two(build: Any, shapes: Any = SHAPES, **options: Any) -> tuple[Any, list[nn.Parameter], Any, list[nn.Parameter]]:
    """An optimizer for graphs, whose learning rate is a tensor, and a twin in float64; each with its parameters."""
    params = [float32(*shape, seed=place) for place, shape in enumerate(shapes)]
    twins = [nn.Parameter(parameter.detach().double()) for parameter in params]

    def groups(each: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [each[0], each[1], each[3]]}, {"params": [each[2]], "neuron_dims": (1,)}]

    rate = torch.tensor(LR)
    optimizer = fused(build, groups(params), lr=rate, capturable=True, **options)
    return optimizer, params, make(build, groups(twins), backend="eager", **options), twins


def set_rate(optimizer: Any, lr: float) -> None:
    """As schedulers do."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def give(params: list[nn.Parameter], twins: list[nn.Parameter], step: int, leave_out: int | None = None) -> None:
    """Gradients, in the memory that the last ones had."""
    for place, (parameter, twin) in enumerate(zip(params, twins, strict=True)):
        grad = gradient(parameter, place, step)
        if parameter.grad is not None and place != leave_out:
            parameter.grad.copy_(grad)
        else:
            parameter.grad = None if place == leave_out else grad
        twin.grad = None if place == leave_out else grad.double()


def assert_alike(optimizer: Any, params: list[nn.Parameter], exact: Any, twins: list[nn.Parameter]) -> None:
    for parameter, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(parameter.double(), twin, rtol=0, atol=FLOAT32)
        state, expected = optimizer.state[parameter], exact.state[twin]
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(torch.as_tensor(state[key]).double(), torch.as_tensor(value).double(), **NEAR)


@pytest.mark.parametrize("options", [{}, {"rotation": "match"}, {"rotation": 0.05, "centering": "updates"}], ids=str)
@pytest.mark.parametrize("name", [*WRITTEN_OUT, "dampening"])
def test_replays_are_steps_under_a_schedule(name: str, options: dict[str, Any], capture: Any) -> None:
    # Of ten thousand sums of gradient and L2 term some nearly cancel, and Adam divides by what is left of each.
    shapes = [(1, 20) if shape[-1] > 10_000 and name == "Adam" else shape for shape in SHAPES]
    build = {**ROTATIONAL, "dampening": partial(RotationalSGD, momentum=0.9, dampening=0.5)}[name]
    optimizer, params, exact, twins = two(build, shapes, **options)
    for step in range(2):
        give(params, twins, step)
        optimizer.step()
        exact.step()
    before = copies(params)
    with capture() as graph:
        optimizer.step()
    exactly_equal(copies(params), before)
    # What counts, the step, and the end of the neuron that programs share.
    assert len(graph) == 2 + (shapes == SHAPES)
    for step, factor in enumerate(RATES, start=2):
        give(params, twins, step)
        for each in (optimizer, exact):
            set_rate(each, factor * LR)
        before = copies(params)
        for launch in graph:
            launch()
        exact.step()
        if factor == 0:
            exactly_equal(copies(params), before)
    assert_alike(optimizer, params, exact, twins)


@pytest.mark.parametrize("name", ["AdamW", "momentum"])
def test_a_graph_goes_on_where_steps_outside_of_it_have_been(name: str, capture: Any) -> None:
    optimizer, params, exact, twins = two(ROTATIONAL[name])
    for step in range(2):
        give(params, twins, step)
        optimizer.step()
        exact.step()
    for step in range(2, 8):
        give(params, twins, step, leave_out=0 if step == 4 else None)
        with capture() as graph:
            optimizer.step()
        if step in (2, 3, 6):
            for launch in graph:
                launch()
        else:
            optimizer.step()
        exact.step()
    assert_alike(optimizer, params, exact, twins)


def test_a_run_may_go_on_without_graphs_and_with_them_again(capture: Any) -> None:
    optimizer, params, exact, twins = two(RotationalAdamW)
    for step in range(8):
        give(params, twins, step)
        if step in (3, 5):
            for group in optimizer.param_groups:
                group["capturable"] = step == 5
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
        exact.step()
        counts = optimizer.state[params[0]]["rotation_step"]
        if step:  # the first makes the state as it is everywhere
            assert isinstance(counts, int if step in (3, 4) else Tensor)
        assert counts == step + 1
    assert_alike(optimizer, params, exact, twins)


def test_only_a_capturable_step_is_captured(capture: Any) -> None:
    parameter = float32(5, 7)
    optimizer = fused(RotationalAdamW, [parameter])
    train(optimizer, [parameter], range(2))
    before = copies([parameter])
    with capture() as graph, pytest.raises(RuntimeError, match="with capturable=True alone"):
        optimizer.step()
    exactly_equal(copies([parameter]), before)
    assert not graph


def test_a_graph_keeps_its_table_when_the_next_step_needs_another(capture: Any) -> None:
    params = [float32(5, 7), float32(6)]
    optimizer = fused(RotationalAdamW, params, capturable=True)
    for step in range(2):
        params[0].grad = gradient(params[0], 0, step)
        optimizer.step()
    with capture() as graph:
        optimizer.step()
    tables = [weakref.ref(argument) for launch in graph for argument in launch.args if isinstance(argument, Tensor)]
    graph.clear()  # a real one has addresses alone
    params[1].grad = gradient(params[1], 1, 0)
    for _ in range(2):
        optimizer.step()
    gc.collect()
    assert tables
    assert all(table() is not None for table in tables)


def test_a_learning_rate_that_replays_would_not_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = float32(5, 7)
    optimizer = RotationalAdamW([parameter], lr=torch.tensor(LR), capturable=True)
    train(optimizer, [parameter], range(2))
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="lr is a tensor on cpu"):
        optimizer.step()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_step_that_makes_state_is_not_captured(steps: int, capture: Any) -> None:
    parameter = float32(5, 7)
    optimizer = fused(RotationalAdamW, [parameter], capturable=True)
    train(optimizer, [parameter], range(steps))
    parameter.grad = gradient(parameter, 0, steps)
    with capture(), pytest.raises(RuntimeError, match="two steps have to be taken before"):
        optimizer.step()


def test_what_the_kernel_does_not_step_is_not_captured(capture: Any) -> None:
    params = [float32(5, 7), nn.Parameter(noise(5, 7, dtype=torch.float64))]
    optimizer = fused(RotationalAdamW, params, capturable=True)
    train(optimizer, params, range(2))
    params[1].grad = gradient(params[1], 0, 0)
    with capture(), pytest.raises(RuntimeError, match=r"1 parameters, the first of shape \(5, 7\), are not stepped"):
        optimizer.step()


def test_stochastic_rounding_draws_anew_in_every_replay(capture: Any) -> None:
    start, grad = noise(16, 64, dtype=torch.float16), noise(16, 64, seed=1, dtype=torch.float16)
    parameter = nn.Parameter(start.clone())
    settings: dict[str, Any] = {"rotation": 1e-3, "rounding": "stochastic", "update_norm_decay": 0.0}
    optimizer = fused(ROTATIONAL["SGD"], [parameter], capturable=True, **settings)
    train(optimizer, [parameter], range(2))
    parameter.grad = grad
    with capture() as graph:
        optimizer.step()
    seen = set()
    for _ in range(3):
        parameter.data.copy_(start)
        for launch in graph:
            launch()
        seen.add(parameter.detach().numpy().tobytes())
    assert len(seen) == 3
