"""Parameters and gradients at the edges: zeros, ones of everything, nothing at all, NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_rotational import RotationalAdamW, RotationalLion, RotationalSGD
from hf_rotational.optim import optimizer as optimizer_module
from hf_rotational.optim import precision
from hf_rotational.optim.precision import ROUNDINGS, sum_dtype
from tests.helpers import (
    LR,
    PLAIN,
    ROTATIONAL,
    WEIGHT_DECAY,
    Builder,
    copies,
    each_backend,
    each_optimizer,
    exactly_equal,
    gradient,
    make,
    noise,
    parameters,
    train,
    turned,
)

each_with_a_plain_one = pytest.mark.parametrize("name", PLAIN)


@each_backend
@each_with_a_plain_one
@pytest.mark.parametrize("size", [0.0, 1e-21], ids=["zero", "square underflows"])
@pytest.mark.parametrize("rows", [slice(1, 3), slice(None)], ids=["rows", "matrix"])
def test_rows_without_a_norm_take_the_plain_step_without_weight_decay(
    rows: slice, size: float, name: str, backend: str
) -> None:
    start = noise(5, 7, dtype=torch.float32)
    start[rows] *= size
    # Two of a shape, for foreach to stack.
    params = [nn.Parameter(start.clone()), nn.Parameter(noise(5, 7, dtype=torch.float32))]
    whole = parameters(torch.float32)[:1]
    twins = [nn.Parameter(start.clone())]
    # Adam's second moment sees the weight decay of whatever rotates.
    weight_decay = 0.0 if name == "Adam" else WEIGHT_DECAY
    options: dict[str, Any] = {"rotation": 0.05, "weight_decay": weight_decay, "backend": backend}
    train(make(ROTATIONAL[name], params, **options), params, range(10))
    train(make(ROTATIONAL[name], whole, **options), whole, range(10))
    train(make(PLAIN[name], twins, weight_decay=0.0), twins, range(10))

    # Ten float32 steps of size lr on weights of size 1.
    torch.testing.assert_close(params[0][rows], twins[0][rows], rtol=1e-5, atol=1e-6)
    others = torch.ones(5, dtype=torch.bool)
    others[rows] = False
    torch.testing.assert_close(params[0][others], whole[0][others], rtol=1e-5, atol=1e-6)


@each_backend
def test_the_norm_of_a_neuron_of_millions_of_entries_is_held(backend: str) -> None:
    parameter = nn.Parameter(noise(2000, 2000, dtype=torch.float32))
    parameter.grad = noise(2000, 2000, seed=1, dtype=torch.float32)
    before = parameter.detach().double().norm()
    make(RotationalSGD, [parameter], granularity="tensor", backend=backend).step()
    # Every entry has its rounding, 6e-8, and so has the factor that rescales them.
    torch.testing.assert_close(parameter.detach().double().norm(), before, rtol=2e-7, atol=0.0)


@each_backend
@each_optimizer
def test_a_neuron_turns_by_the_target_when_its_first_gradient_comes(build: Builder, backend: str) -> None:
    parameter = nn.Parameter(noise(5, 7, dtype=torch.float32))
    optimizer = make(build, [parameter], rotation=0.05, backend=backend)
    for step in range(4):
        before = parameter.detach().clone()
        parameter.grad = gradient(parameter, 0, step)
        parameter.grad[1] = 0.0 if step < 3 else parameter.grad[1]
        optimizer.step()
        if step < 3:
            exactly_equal(parameter[1].detach(), before[1])
    # Float32 rounds entries of size 1 by 6e-8, of an angle of 0.05.
    assert turned(before, parameter.detach())[1].item() == pytest.approx(math.atan(0.05), rel=1e-5)


def test_lion_moves_a_zero_row_by_signs() -> None:
    start = noise(5, 7)
    start[1] = 0.0
    parameter = nn.Parameter(start)
    train(make(RotationalLion, [parameter]), [parameter], [0])
    exactly_equal(parameter[1].detach(), -LR * gradient(parameter, 0, 0)[1].sign())


@each_with_a_plain_one
@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((5, 1), {}),
        ((5, 1, 1), {}),
        ((5, 7), {"neuron_dims": (0, 1)}),
        ((5, 2), {"centering": "weights"}),
        ((1, 1), {"granularity": "tensor"}),
    ],
    ids=str,
)
def test_neurons_too_small_to_have_a_direction_take_the_plain_step(
    shape: tuple[int, ...], group: dict[str, Any], name: str
) -> None:
    parameter, twin = nn.Parameter(noise(*shape)), nn.Parameter(noise(*shape))
    train(make(ROTATIONAL[name], [{"params": [parameter], **group}]), [parameter], range(10))
    train(make(PLAIN[name], [twin]), [twin], range(10))
    torch.testing.assert_close(parameter, twin, rtol=1e-12, atol=1e-12)


@each_backend
@each_optimizer
@pytest.mark.parametrize("rotation", ["equilibrium", "match"])
@pytest.mark.parametrize("granularity", ["neuron", "tensor"])
def test_empty_tensors_are_no_trouble(build: Builder, granularity: str, rotation: str, backend: str) -> None:
    options: dict[str, Any] = {"granularity": granularity, "rotation": rotation, "backend": backend}
    empty = [nn.Parameter(torch.empty(shape, dtype=torch.float64)) for shape in ((0, 5), (5, 0), (0,), (0, 3, 2))]
    params, alone = parameters(), parameters()
    train(make(build, [*params, *empty], **options), [*params, *empty], range(3))
    train(make(build, alone, **options), alone, range(3))
    exactly_equal(params, alone)
    train(make(build, empty, **options), empty, range(3))


@each_backend
@each_optimizer
def test_a_step_without_a_gradient_is_no_step(build: Builder, backend: str) -> None:
    params, twins = parameters(), parameters()
    optimizer = make(build, params, backend=backend)
    alone = [make(build, [twin], backend=backend) for twin in twins]
    for step in range(7):
        optimizer.zero_grad()
        present = [parameter if (step + place) % 3 else None for place, parameter in enumerate(params)]
        train(optimizer, present, [step])
        for place, twin in enumerate(twins):
            if present[place] is not None:
                twin.grad = gradient(twin, place, step)
                alone[place].step()
    exactly_equal(params, twins)


@each_optimizer
def test_frozen_parameters_stay_and_thaw_like_new(build: Builder) -> None:
    params, twins = parameters(), parameters()
    frozen = params[0].requires_grad_(False)
    start = frozen.detach().clone()
    optimizer = make(build, params)
    train(optimizer, [None, *params[1:]], range(3))
    exactly_equal(frozen.detach(), start)
    assert not optimizer.state.get(frozen)

    optimizer.zero_grad()
    frozen.requires_grad_(True)
    train(optimizer, [frozen], range(3))
    train(make(build, twins[:1]), twins[:1], range(3))
    exactly_equal(frozen, twins[0])


@each_optimizer
def test_tied_weights_turn_once(build: Builder) -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 7)).double()
    model[2].weight = model[0].weight
    twin = nn.Parameter(model[0].weight.detach().clone())
    optimizer, alone = make(build, model.parameters()), make(build, [twin])
    for step in range(3):
        optimizer.zero_grad()
        model(noise(4, 7, seed=step)).square().sum().backward()
        twin.grad = model[0].weight.grad.clone()
        optimizer.step()
        alone.step()
    assert model[2].weight is model[0].weight
    exactly_equal(model[0].weight, twin)


def test_a_parameter_in_two_groups_is_refused_as_in_torch() -> None:
    parameter = nn.Parameter(noise(5, 7))
    with pytest.raises(ValueError, match="more than one parameter group"):
        RotationalAdamW([{"params": [parameter]}, {"params": [parameter]}])


@each_optimizer
@pytest.mark.parametrize("rotation", ["equilibrium", "match", 0.05])
def test_a_group_added_later_trains_as_if_alone(build: Builder, rotation: str | float) -> None:
    params, late, twins = parameters(), parameters(), parameters()
    optimizer, alone = make(build, params, rotation=rotation), make(build, twins, rotation=rotation)
    train(optimizer, params, range(3))
    optimizer.add_param_group({"params": late})
    optimizer.zero_grad()
    train(optimizer, late, range(3))
    train(alone, twins, range(3))
    exactly_equal(late, twins)


@pytest.mark.parametrize("wrong", [{"lr": "fast"}, {"betas": 0.9}], ids=str)
def test_a_group_that_cannot_be_checked_is_not_added(wrong: dict[str, Any]) -> None:
    optimizer = RotationalAdamW(parameters())
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group({"params": parameters(), **wrong})
    assert len(optimizer.param_groups) == 1


def test_a_group_added_later_turns_by_the_angle_match_has_measured() -> None:
    params, large = parameters(), nn.Parameter(100 * noise(5, 7))
    optimizer = RotationalAdamW(params, rotation="match")
    angle = optimizer.target_rotation(optimizer.param_groups[0])
    optimizer.add_param_group({"params": [large]})
    assert optimizer.target_rotation(optimizer.param_groups[1]) == angle


@each_backend
@each_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("granularity", ["neuron", "tensor"])
def test_nan_and_infinity_stay_where_they_came(build: Builder, granularity: str, bad: float, backend: str) -> None:
    # Two of a shape, for foreach to stack.
    spoiled, clean = ([*parameters(), nn.Parameter(noise(5, 7))] for _ in range(2))
    optimizer, twin = (make(build, each, granularity=granularity, backend=backend) for each in (spoiled, clean))
    for step in range(6):
        for place, (parameter, other) in enumerate(zip(spoiled, clean, strict=True)):
            parameter.grad, other.grad = (gradient(parameter, place, step) for _ in range(2))
        if step == 2:
            spoiled[0].grad[1, 3] = bad
        optimizer.step()
        twin.step()
    lost = [1] if granularity == "neuron" else range(5)
    kept = [row for row in range(5) if row not in lost]
    exactly_equal(spoiled[0][kept], clean[0][kept])
    exactly_equal(spoiled[1:], clean[1:])
    if isinstance(optimizer, RotationalLion):
        assert spoiled[0].isfinite().all()
    else:
        assert spoiled[0][lost].isnan().all()


@each_optimizer
@pytest.mark.parametrize("rotational_eps", [0.0, 1e-8])
def test_neurons_without_gradients_rest_beside_others_that_turn(build: Builder, rotational_eps: float) -> None:
    parameter = nn.Parameter(noise(5, 7))
    optimizer = make(build, [parameter], rotational_eps=rotational_eps)
    for step in range(3):
        (before,) = copies([parameter])
        parameter.grad = gradient(parameter, 0, step)
        parameter.grad[1] = 0.0
        optimizer.step()
        exactly_equal(parameter[1].detach(), before[1])
        assert (turned(before, parameter)[[0, 2, 3, 4]] > 0).all()


each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
each_rounding = pytest.mark.parametrize("rounding", ROUNDINGS)


@each_optimizer
@each_rounding
@each_dtype
@pytest.mark.parametrize("trained", [0, 3], ids=["fresh", "trained"])
def test_learning_rate_0_makes_state_and_leaves_weights_alone(
    trained: int, dtype: torch.dtype, rounding: str, build: Builder
) -> None:
    # Enough entries for some whose remainder is half a last place, where rounding is a close call.
    params = [nn.Parameter(noise(64, 64, dtype=dtype)), nn.Parameter(noise(64, dtype=dtype))]
    optimizer = make(build, params, rounding=rounding)
    train(optimizer, params, range(trained))
    before = copies(params)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, params, range(trained, trained + 2))
    exactly_equal(copies(params), before)
    assert {"norm", "update_norm_sq"} <= optimizer.state[params[0]].keys()


@each_optimizer
@each_rounding
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_parameters_step_in_float32(dtype: torch.dtype, rounding: str, build: Builder) -> None:
    params, twins = parameters(dtype), [nn.Parameter(p.detach().float()) for p in parameters(dtype)]
    optimizer, exact = make(build, params, rounding=rounding), make(build, twins, backend="eager")
    for place, (parameter, twin) in enumerate(zip(params, twins, strict=True)):
        parameter.grad = gradient(parameter, place, 0)
        twin.grad = parameter.grad.float()
    optimizer.step()
    exact.step()
    for parameter, twin in zip(params, twins, strict=True):
        state, nearest = optimizer.state[parameter], twin.detach().to(dtype)
        if rounding == "stochastic":
            neighbours = [torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (-math.inf, math.inf)]
            assert (torch.stack([nearest, *neighbours]) == parameter).any(dim=0).all()
        else:
            exactly_equal(parameter.detach(), nearest)
        if rounding == "kahan":
            exactly_equal(state["compensation"], (twin.detach() - nearest).to(dtype))
        numbers = {key: value for key, value in state.items() if isinstance(value, Tensor) and key != "compensation"}
        assert {value.dtype for value in numbers.values()} <= {torch.float32}
        exactly_equal(numbers, {key: exact.state[twin][key] for key in numbers})


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_small_steps_add_up_unless_rounded_to_nearest(rounding: str) -> None:
    weight, exact = nn.Parameter(noise(64, 64, dtype=torch.bfloat16)), nn.Parameter(noise(64, 64).bfloat16().float())
    start, direction = exact.detach().clone(), noise(64, 64, seed=1)
    options = {"rotation": 1e-4, "update_norm_decay": 0.0}
    optimizer, in_float32 = (
        make(RotationalAdamW, [weight], rounding=rounding, **options),
        make(RotationalAdamW, [exact], **options),
    )
    for _ in range(20):
        weight.grad, exact.grad = direction.bfloat16(), direction.bfloat16().float()
        optimizer.step()
        in_float32.step()
    way = exact.detach() - start
    gone = float(((weight.detach().float() - start) * way).sum() / way.square().sum())
    if rounding == "nearest":
        assert (weight == start).float().mean() > 0.5
    elif rounding == "stochastic":
        # The standard error of 4096 entries that jump by two or three times their way or not at all is about 0.03.
        assert gone == pytest.approx(1.0, abs=0.15)
    else:
        remainder = optimizer.state[weight]["compensation"].float()
        # Twenty roundings to 8 bits of a remainder of at most 2^-7, half the last place of weights up to 4.
        torch.testing.assert_close(weight.detach().float() + remainder, exact.detach(), rtol=0, atol=20 * 2**-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centering", ["none", "updates"])
def test_what_rounding_leaves_of_a_radial_or_constant_update_turns_nothing(dtype: torch.dtype, centering: str) -> None:
    matrix = nn.Parameter(noise(64, 33, dtype=dtype))
    before = matrix.detach().clone()
    optimizer = RotationalSGD([matrix], lr=LR, weight_decay=WEIGHT_DECAY, centering=centering)
    for step in range(3):
        matrix.grad = (step + 0.1) * (before if centering == "none" else torch.ones_like(before))
        optimizer.step()
    exactly_equal(matrix.detach(), before)


def test_a_constant_neuron_has_no_direction_once_its_mean_is_gone() -> None:
    matrix = nn.Parameter(torch.full((2, 30), 0.1))
    with torch.no_grad():
        matrix[1].copy_(noise(30))
    optimizer = RotationalAdamW([matrix], lr=LR, weight_decay=WEIGHT_DECAY, centering="weights")
    train(optimizer, [matrix], range(3))
    # The plain steps, not the 1e-8 that rounding left, are where it is now.
    assert 0.1 * LR < matrix[0].abs().mean() < 10 * LR
    assert optimizer.state[matrix]["norm"].flatten().gt(0).tolist() == [False, True]


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors, as Apple's GPUs do."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        assert all(found.dtype != torch.float64 for found in tree_leaves(result) if isinstance(found, Tensor)), function
        return result


@pytest.mark.parametrize(
    "options", [{}, {"rotation": "match"}, {"gains": "learned"}, {"centering": "weights"}], ids=str
)
def test_a_device_without_float64_does_without(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum_dtype(torch.empty(1, device="meta")) == torch.float32
    for module in (precision, optimizer_module):
        monkeypatch.setattr(module, "sum_dtype", lambda tensor: torch.float32)
    params = parameters(torch.float32)
    optimizer = make(RotationalAdamW, params, backend="foreach", **options)
    with NoFloat64():
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()


@each_backend
def test_steps_are_counted_whatever_the_default_dtype(backend: str) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        params = parameters(torch.float32)
        optimizer = make(RotationalAdamW, params, gains="learned", backend=backend)
        train(optimizer, params, range(1))
    finally:
        torch.set_default_dtype(torch.float32)
    for state in optimizer.state.values():
        counters = [value for name, value in state.items() if name.endswith("step") and isinstance(value, Tensor)]
        assert {counter.dtype for counter in counters} == {torch.float32}


def test_a_group_may_be_taken_out() -> None:
    params = parameters(torch.float32)
    optimizer = make(RotationalAdamW, [{"params": [parameter]} for parameter in params])
    train(optimizer, params, range(2))
    gone = optimizer.param_groups.pop()["params"][0]
    before = copies([gone])
    train(optimizer, params, range(2, 4))
    exactly_equal(copies([gone]), before)
