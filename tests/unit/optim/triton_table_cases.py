"""That the CUDA kernel's table is kept from step to step for as long as it holds, on a CPU in Triton's interpreter.

``test_triton.py`` runs this file, as ``triton_cases.py``, in a process of its own.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rotational import RotationalAdamW, RotationalSGD
from hf_rotational.optim.kernels import triton
from hf_rotational.optim.optimizer import matrix_shapes
from tests.helpers import LR, ROTATIONAL, WRITTEN_OUT, exactly_equal, gradient, make, noise, train
from tests.unit.optim.on_triton import FLOAT32, NEAR, Launches, float32, fused

pytest_plugins = ["tests.unit.optim.on_triton"]
# numpy, which the interpreter computes with, warns of what rows without a norm divide by.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KEPT = [(5, 7), (6, 6), (9,)]


def pairs(optimizer: Any, exact: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The parameters of both, side by side."""
    for group, twin in zip(optimizer.param_groups, exact.param_groups, strict=True):
        yield from zip(group["params"], twin["params"], strict=True)


def assert_same_steps(
    steps: int, between: Callable[[int, Any], None], *, build: Any = RotationalAdamW, **options: Any
) -> None:
    """Takes steps by the kernel and in float64, with what ``between(step, optimizer)`` does to each before they have
    gradients for it, and compares weights and state."""
    shapes = {place: noise(*shape, seed=place, dtype=torch.float32) for place, shape in enumerate(KEPT)}
    optimizer = fused(build, [nn.Parameter(start.clone()) for start in shapes.values()], **options)
    exact = make(build, [nn.Parameter(start.double()) for start in shapes.values()], backend="eager", **options)
    for step in range(steps):
        for each in (optimizer, exact):
            between(step, each)
        for place, (parameter, twin) in enumerate(pairs(optimizer, exact)):
            # At another address than before, as after zero_grad(set_to_none=True).
            parameter.grad = None if (place + step) % 4 == 3 else gradient(parameter, place, step)
            twin.grad = None if parameter.grad is None else parameter.grad.double()
        optimizer.step()
        exact.step()
    for parameter, twin in pairs(optimizer, exact):
        torch.testing.assert_close(parameter.double(), twin, rtol=0, atol=FLOAT32)
        assert optimizer.state[parameter].keys() == exact.state[twin].keys()
        for key, value in exact.state[twin].items():
            found = optimizer.state[parameter][key]
            torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(value).double(), **NEAR)


@pytest.mark.parametrize("name", ["AdamW", "nesterov"])
def test_a_schedule_lays_out_one_table_and_compiles_one_kernel(name: str, launches: Launches) -> None:
    def schedule(step: int, optimizer: Any) -> None:
        (group,) = optimizer.param_groups
        group["lr"] = LR * [0.1, 0.5, 1.0, 0.0, 0.7, 0.3][step]
        if "momentum" in group:  # as one-cycle schedules do
            group["momentum"] = 0.95 - 0.01 * step
        else:
            group["betas"] = (0.95 - 0.01 * step, 0.999)

    assert_same_steps(6, schedule, build=ROTATIONAL[name])
    assert launches.tables == len(launches.compiled) == 1
    assert launches == [3] * 5


def replace_weights(optimizer: Any) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.data = parameter.detach().clone()


def transpose_weights_in_place(optimizer: Any) -> None:
    square = optimizer.param_groups[0]["params"][1]
    square.data = square.detach().t()


def replace_a_parameter(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    new = nn.Parameter(params[0].detach().clone())
    optimizer.state[new] = optimizer.state.pop(params[0])
    params[0] = new


def replace_moments(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = 0.5 * state["exp_avg"]


def replace_counters(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"] = torch.tensor(int(state["step"]) + 3)


def replace_states(optimizer: Any) -> None:
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = copy.deepcopy(state)


def forget_a_state(optimizer: Any) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][0]]


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def add_a_group(optimizer: Any) -> None:
    own = optimizer.param_groups[0]["params"][0]
    optimizer.add_param_group({"params": [nn.Parameter(noise(4, 5, seed=9, dtype=own.dtype))], "lr": 0.5 * LR})


def regroup(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    optimizer.param_groups.append({**group, "params": [group["params"].pop(0)], "weight_decay": 0.3})
    optimizer._shapes = [matrix_shapes(each) for each in optimizer.param_groups]


def change(**options: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[0].update(options)


CHANGES: dict[str, Callable[[Any], None]] = {
    "weights": replace_weights,
    "strides": transpose_weights_in_place,
    "a parameter": replace_a_parameter,
    "moments": replace_moments,
    "counters": replace_counters,
    "states": replace_states,
    "a state": forget_a_state,
    "all, by loading": load,
    "groups, by a new one": add_a_group,
    "groups": regroup,
    "centering": change(centering="updates"),
    "memory": change(update_norm_decay=0.5),
    "backend": change(backend="foreach"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_the_kernel_notices_what_was_replaced(what: str, launches: Launches) -> None:
    assert_same_steps(4, lambda step, optimizer: CHANGES[what](optimizer) if step == 2 else None)
    assert len(launches) == (1 if what == "backend" else 3)


def test_memory_that_now_holds_other_weights_is_not_taken_for_the_old_ones() -> None:
    memory = noise(80, dtype=torch.float32)
    parameter = nn.Parameter(memory.view(8, 10))
    optimizer = fused(RotationalSGD, [parameter])
    for step in range(3):
        if step == 2:
            parameter.data = memory.view(torch.bfloat16)[:80].view(8, 10)
            rest = memory[40:].clone()
        parameter.grad = gradient(parameter, 0, step)
        optimizer.step()
    exactly_equal(memory[40:], rest)


def test_gradients_may_come_as_other_numbers_or_at_odd_addresses(launches: Launches) -> None:
    parameter, twin = float32(5, 8), nn.Parameter(noise(5, 8, dtype=torch.float32).double())
    optimizer, exact = fused(RotationalAdamW, [parameter]), make(RotationalAdamW, [twin], backend="eager")
    for step in range(6):
        grad = gradient(parameter, 0, step)
        if step in (2, 3):  # as in buckets of all gradients
            grad = torch.cat([torch.zeros(1), grad.flatten()])[1:].view(5, 8)
        elif step == 4:
            grad = grad.t().contiguous().t()
        twin.grad = grad.double()
        parameter.grad = grad
        if step == 5:
            parameter.grad_dtype = None
            parameter.grad = grad.bfloat16()
            twin.grad = parameter.grad.double()
        optimizer.step()
        exact.step()
    torch.testing.assert_close(parameter.double(), twin, rtol=0, atol=FLOAT32)
    # Aligned, not so, aligned, and bfloat16.
    assert launches.tables == 4


def test_weights_are_centred_with_the_first_step_that_moves_them(launches: Launches) -> None:
    def warm_up(step: int, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = LR * (step > 1)

    assert_same_steps(6, warm_up, centering="weights")
    # The vector alone; with the matrix that step 2 centres; and with the other, which has no gradient before step 3.
    assert launches == [1, 2, 3, 3]


def test_a_sparse_gradient_is_refused_after_dense_ones() -> None:
    parameter = float32(5, 7)
    optimizer = fused(RotationalAdamW, [parameter])
    train(optimizer, [parameter], range(3))
    parameter.grad = gradient(parameter, 0, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


def test_rounding_may_change_in_the_course_of_a_run(launches: Launches) -> None:
    weight, twin = (nn.Parameter(noise(8, 16, dtype=torch.float16)) for _ in range(2))
    optimizer, other = fused(RotationalAdamW, [weight]), make(RotationalAdamW, [twin], backend="foreach")
    for rounding, steps in {"nearest": range(2), "kahan": range(2, 5), "stochastic": range(5, 6)}.items():
        for each, parameter in ((optimizer, weight), (other, twin)):
            each.param_groups[0]["rounding"] = rounding
            train(each, [parameter], steps)
        # Sums in another order may round a weight, of up to 4, to its other neighbour.
        torch.testing.assert_close(weight.detach(), twin.detach(), rtol=0, atol=2 * 4 * torch.finfo(weight.dtype).eps)
        assert optimizer.state[weight].keys() == other.state[twin].keys()
    assert len(launches) == 6 - 2  # the first, and the one that makes Kahan's remainder


def test_stochastic_rounding_draws_anew_for_every_tensor_and_step() -> None:
    start, grad = noise(16, 64, dtype=torch.float16), noise(16, 64, seed=1, dtype=torch.float16)
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = fused(RotationalSGD, params, rotation=1e-3, rounding="stochastic", update_norm_decay=0.0)
    seen: set[bytes] = set()
    for step in range(3):
        for parameter in params:
            parameter.data.copy_(start)
            parameter.grad = grad.clone()
        optimizer.step()
        if step:
            seen |= {parameter.detach().numpy().tobytes() for parameter in params}
    assert len(seen) == 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_shards_take_the_steps_of_whole_weights(mesh: DeviceMesh, launches: Launches) -> None:
    def run(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        params = [
            nn.Parameter(place(noise(*shape, seed=seed, dtype=torch.bfloat16))) for seed, shape in enumerate(KEPT)
        ]
        optimizer = fused(RotationalAdamW, params, rounding="kahan")
        for step in range(4):
            for seed, (parameter, shape) in enumerate(zip(params, KEPT, strict=True)):
                parameter.grad = place(noise(*shape, seed=10 * step + seed, dtype=torch.bfloat16))
            optimizer.step()
        return [part.to_local() if isinstance(part, DTensor) else part for part in params]

    exactly_equal(run(lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)])), run(Tensor.clone))
    assert launches == [3] * 6
    assert launches.tables == 2


def test_a_graph_that_holds_weights_notices_the_step() -> None:
    stepped, without = float32(5, 7), float32(5, 7)
    optimizer = fused(RotationalAdamW, [stepped, without])
    train(optimizer, [stepped, without], range(2))
    losses = [parameter.square().sum() for parameter in (stepped, without)]
    without.grad = None
    optimizer.step()
    losses[1].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()


def test_what_is_replaced_is_let_go() -> None:
    parameter = float32(5, 7)
    optimizer = fused(RotationalAdamW, [parameter])
    train(optimizer, [parameter], range(3))
    before = weakref.ref(optimizer.state[parameter]["exp_avg"])
    load(optimizer)
    assert before() is None
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


class Operations(TorchDispatchMode):
    """Names of torch's operations, but for those by which its profiler marks a step."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "profiler":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_step_is_one_copy_to_the_device_and_reads_nothing_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [float32(*shape, seed=place) for place, shape in enumerate([*KEPT, (1, 20_001)])]
    optimizer = fused(ROTATIONAL[name], params, rotation="match", transient_correction=True)
    train(optimizer, params, range(2))
    monkeypatch.setattr(triton, "rotational_step", MagicMock())
    with Operations() as operations:
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
    # The table as a tensor, and its copy. An `item()` would be `aten::_local_scalar_dense`.
    assert operations.names == ["aten::lift_fresh", "aten::copy_"]
