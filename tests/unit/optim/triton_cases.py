"""What holds for the CUDA kernel, on a CPU in Triton's interpreter.

``test_triton.py`` runs this file in a process of its own: Triton decides at its import whether to interpret. The
interpreter takes some 20 ms a program, so tensors are small and steps few. A run's first step is taken tensor by
tensor, as it makes the state; the kernel takes those after it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_rotational import RotationalAdamW, RotationalSGD
from tests.helpers import (
    LR,
    PLAIN,
    ROTATIONAL,
    WEIGHT_DECAY,
    WRITTEN_OUT,
    PlainLion,
    copies,
    exactly_equal,
    gradient,
    gradients,
    make,
    noise,
    train,
    train_on,
)
from tests.reference import rotational as reference
from tests.unit.optim.on_triton import FLOAT32, NEAR, Launches, float32, fused
from tests.unit.optim.test_exactness import VARIANTS, Variant, variants

pytest_plugins = ["tests.unit.optim.on_triton"]
# numpy, which the interpreter computes with, warns of what rows without a norm divide by.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one row": ((1, 40), {}),
    "more rows than a tile": ((70, 5), {}),
    "rows that fill a tile": ((2, 4096), {}),
    "rows longer than a tile": ((2, 4097), {}),
    "rows that programs share": ((2, 20_001), {}),
    "stacked rows": ((2, 3, 5), {"neuron_dims": (0, 1)}),
    "one column": ((40, 1), {"neuron_dims": (1,)}),
    "more columns than a tile": ((9, 33), {"neuron_dims": (1,)}),
    "columns longer than a tile": ((70, 5), {"neuron_dims": (1,)}),
    "stacked columns": ((3, 66, 4), {"neuron_dims": (0, 2)}),
    "a whole tensor": ((3, 4, 5), {"granularity": "tensor"}),
    "a whole tensor that programs share": ((3, 100, 60), {"granularity": "tensor"}),
}
layouts = pytest.mark.parametrize(("shape", "group"), LAYOUTS.values(), ids=LAYOUTS)


def as_rows(tensor: Tensor, group: dict[str, Any]) -> reference.Array:
    """Neurons along the first dim."""
    dims = () if group.get("granularity") == "tensor" else group.get("neuron_dims", (0,))
    neurons = math.prod(tensor.shape[dim] for dim in dims)
    return np.moveaxis(tensor.detach().double().numpy(), dims, range(len(dims))).reshape(neurons, -1)


def assert_follows_formulas(
    variant: Variant, shape: tuple[int, ...], steps: int, group: dict[str, Any], centering: str
) -> None:
    parameter, grads = float32(*shape), gradients(shape, steps)
    start = as_rows(parameter, group)
    options = {"weight_decay": WEIGHT_DECAY, "centering": centering, "backend": "fused"}
    train_on(variant.build([{"params": [parameter], **group}], lr=LR, **options), {parameter: grads}, [LR] * steps)
    rows = [as_rows(grad, group) for grad in grads]
    expected = reference.rotate(start, rows, variant.direction(), [variant.angle(LR)] * steps, centering)
    np.testing.assert_allclose(as_rows(parameter, group), expected, rtol=0, atol=FLOAT32)


@variants
@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
def test_every_optimizer_and_centering(centering: str, variant: Variant, launches: Launches) -> None:
    assert_follows_formulas(variant, (5, 9), 8, {}, centering)
    assert launches == [1] * 7


@layouts
def test_every_layout(shape: tuple[int, ...], group: dict[str, Any], launches: Launches) -> None:
    # Not Adam's first update: it is signs, which are all the same in some short neurons, and then rounding turns them.
    assert_follows_formulas(VARIANTS["sgd_nesterov"], shape, 3, group, "updates")
    assert len(launches) == (4 if math.prod(shape) > 10_000 else 2)


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("shape", [(2, 4097), (2, 20_001)], ids=str)
def test_long_rows(shape: tuple[int, ...], name: str) -> None:
    assert_follows_formulas(VARIANTS[name], shape, 3, {}, "weights")


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_what_does_not_rotate_takes_the_plain_step(name: str, launches: Launches) -> None:
    sizes = [(7,), (2049,)]
    params = [float32(*shape) for shape in sizes]
    twins = [nn.Parameter(parameter.detach().double()) for parameter in params]
    optimizer = fused(ROTATIONAL[name], params)
    settings = {"betas": optimizer.defaults["betas"]} if name == "Lion" else {}
    plain = {**PLAIN, "Lion": PlainLion}[name](twins, lr=LR, weight_decay=WEIGHT_DECAY, **settings)
    for step in range(4):
        for place, (parameter, twin) in enumerate(zip(params, twins, strict=True)):
            parameter.grad = gradient(parameter, place, step)
            twin.grad = parameter.grad.double()
        optimizer.step()
        plain.step()
    assert launches == [3] * 3
    for parameter, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(parameter.double(), twin, rtol=0, atol=FLOAT32)


OPTIONS: dict[str, dict[str, Any]] = {
    "corrects the transient": {"transient_correction": True},
    "forgets at once": {"update_norm_decay": 0.0},
    "climbs": {"maximize": True},
    "large eps": {"rotational_eps": 0.5},
    "angle": {"rotation": 0.05},
    "match": {"rotation": "match"},
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_schedules_as_in_float64(options: dict[str, Any], name: str) -> None:
    shapes = [(5, 7), (70, 3), (6,)]
    params = [float32(*shape, seed=place) for place, shape in enumerate(shapes)]
    twins = [nn.Parameter(parameter.detach().double()) for parameter in params]

    def groups(each: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": [each[0], each[2]]}, {"params": [each[1]], "neuron_dims": (1,), "lr": 2 * LR}]

    optimizer = fused(ROTATIONAL[name], groups(params), **options)
    exact = make(ROTATIONAL[name], groups(twins), backend="eager", **options)
    for step, factor in enumerate([0.5, 1.0, 0.0, 0.7, 0.3]):
        for each in (optimizer, exact):
            for group in each.param_groups:
                group["lr"] = group["peak_lr"] * factor
        for place, (parameter, twin) in enumerate(zip(params, twins, strict=True)):
            parameter.grad = gradient(parameter, place, step)
            parameter.grad[step % 5] = 0.0  # a neuron, or part of some, without a gradient
            twin.grad = parameter.grad.double()
        before = copies(params)
        optimizer.step()
        exact.step()
        if factor == 0.0:
            exactly_equal(copies(params), before)
    for parameter, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(parameter.double(), twin, rtol=0, atol=FLOAT32)
        for key, value in exact.state[twin].items():
            found = optimizer.state[parameter][key]
            torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(value).double(), **NEAR)


@layouts
def test_nan_stays_where_it_came(shape: tuple[int, ...], group: dict[str, Any]) -> None:
    assert_stays(math.nan, shape, group)


@pytest.mark.parametrize("layout", ["more rows than a tile", "rows longer than a tile", "more columns than a tile"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf], ids=str)
def test_infinity_becomes_nan_where_it_came(bad: float, layout: str) -> None:
    assert_stays(bad, *LAYOUTS[layout])


def assert_stays(bad: float, shape: tuple[int, ...], group: dict[str, Any]) -> None:
    spoiled, clean = float32(*shape), float32(*shape)
    for parameter in (spoiled, clean):
        optimizer = fused(RotationalAdamW, [{"params": [parameter], **group}])
        for step in range(3):
            parameter.grad = gradient(parameter, 0, step)
            if parameter is spoiled and step == 1:
                parameter.grad.view(-1)[-2] = bad
            optimizer.step()
    found, expected = as_rows(spoiled, group), as_rows(clean, group)
    lost = np.isnan(found).any(axis=1)
    assert lost.sum() == 1
    assert np.isnan(found[lost]).all()
    np.testing.assert_array_equal(found[~lost], expected[~lost])


@pytest.mark.parametrize("name", ["AdamW", "momentum"])
@pytest.mark.parametrize("neuron_dim", [0, 1])
def test_neurons_without_a_norm_take_the_plain_step(neuron_dim: int, name: str) -> None:
    start = noise(70, 66, dtype=torch.float32)
    start.select(neuron_dim, 1).zero_()
    parameter, twin = nn.Parameter(start.clone()), nn.Parameter(start.double())
    optimizer = fused(ROTATIONAL[name], [{"params": [parameter], "neuron_dims": (neuron_dim,)}])
    plain = make(PLAIN[name], [twin], weight_decay=0.0)
    for step in range(3):
        parameter.grad = gradient(parameter, 0, step)
        twin.grad = parameter.grad.double()
        optimizer.step()
        plain.step()
    found, expected = (each.detach().double().select(neuron_dim, 1) for each in (parameter, twin))
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT32)


@layouts
@pytest.mark.parametrize("centering", ["none", "updates"])
def test_what_rounding_leaves_of_a_radial_or_constant_update_turns_nothing(
    centering: str, shape: tuple[int, ...], group: dict[str, Any]
) -> None:
    parameter = float32(*shape)
    before = parameter.detach().clone()
    options = {"lr": LR, "weight_decay": WEIGHT_DECAY, "centering": centering, "backend": "fused"}
    optimizer = RotationalSGD([{"params": [parameter], **group}], **options)
    for step in range(3):
        parameter.grad = (step + 0.1) * (before if centering == "none" else torch.ones_like(before))
        optimizer.step()
    exactly_equal(parameter.detach(), before)


def test_a_step_repeats_bit_for_bit_and_is_one_launch_or_two(launches: Launches) -> None:
    shapes = [(5, 7), (70, 5), (2, 4097), (40,), (3, 4, 5)]

    def run(*more: tuple[int, ...]) -> list[nn.Parameter]:
        params = [float32(*shape, seed=place) for place, shape in enumerate([*shapes, *more])]
        groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.2}]
        train(fused(RotationalAdamW, groups), params, range(3))
        return params

    longer, again, first = run((1, 20_001)), run((1, 20_001)), run()
    exactly_equal(again, longer)
    exactly_equal(longer[: len(shapes)], first)
    assert launches == [9, 2] * 4 + [7] * 2


def test_checkpoints_go_from_backend_to_backend() -> None:
    variant, parameter, grads = VARIANTS["adamw"], float32(5, 9), gradients((5, 9), 9)
    start = as_rows(parameter, {})
    state: dict[str, Any] = {}
    for part, backend in enumerate(["eager", "fused", "foreach"]):
        optimizer = variant.build([parameter], lr=LR, weight_decay=WEIGHT_DECAY)
        if state:
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["backend"] = backend
        train_on(optimizer, {parameter: grads[3 * part : 3 * part + 3]}, [LR] * 3)
        state = optimizer.state_dict()
    rows = [grad.numpy() for grad in grads]
    expected = reference.rotate(start, rows, variant.direction(), [variant.angle(LR)] * 9)
    np.testing.assert_allclose(as_rows(parameter, {}), expected, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(
    "options",
    [{"gains": "learned"}, {"centering": "learned"}, {"dtype": torch.float64}, {"neuron_dims": (1,)}],
    ids=str,
)
def test_what_the_kernel_has_not_runs_elsewhere(options: dict[str, Any], launches: Launches) -> None:
    dtype = options.pop("dtype", torch.float32)
    group = {"neuron_dims": options.pop("neuron_dims", (0,))}
    params, twins = ([nn.Parameter(noise(3, 4, 2, dtype=dtype))] for _ in range(2))
    train(fused(RotationalAdamW, [{"params": params, **group}], **options), params, range(3))
    train(make(RotationalAdamW, [{"params": twins, **group}], backend="foreach", **options), twins, range(3))
    exactly_equal(params, twins)
    assert not launches


@pytest.mark.parametrize("shape", [(64, 64), (64,)], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_weights_are_what_float32_gives_rounded(
    dtype: torch.dtype, rounding: str, shape: tuple[int, ...]
) -> None:
    options = {"rotation": 1e-3, "update_norm_decay": 0.0}
    weight = nn.Parameter(noise(*shape, dtype=dtype))
    exact, replica = nn.Parameter(weight.detach().float()), nn.Parameter(weight.detach().clone())
    optimizer, other = (fused(RotationalAdamW, [each], rounding=rounding, **options) for each in (weight, replica))
    in_float32 = make(RotationalAdamW, [exact], backend="eager", **options)
    for step in range(3):
        for each in (weight, exact, replica):
            each.grad = gradient(weight, 0, step).to(each.dtype)
        if rounding != "kahan":  # which carries the remainder over
            with torch.no_grad():
                exact.copy_(weight)
        for each in (optimizer, in_float32, other):
            each.step()
    exactly_equal(weight.detach(), replica.detach())
    found = weight.detach().double()
    if rounding == "kahan":
        found += optimizer.state[weight]["compensation"]
    error = found - exact.detach().double()
    # Half a last place; Triton's interpreter, unlike the device, cuts bfloat16 off. Kahan's remainder has as many bits.
    last_place = torch.finfo(dtype).eps * exact.detach().double().abs()
    bits = {"nearest": 0.5 if dtype == torch.float16 else 1.0, "stochastic": 1.0, "kahan": 3 * torch.finfo(dtype).eps}
    assert (error.abs() <= bits[rounding] * last_place + FLOAT32).all()
    if rounding == "stochastic":
        # Right on average: errors away from 0 have a standard deviation of less than half a last place. A quarter is
        # not what rounding to nearest gives, with a standard deviation of 0.05 for 64 entries.
        bias = (error * exact.detach().sign() / last_place).mean()
        assert bias.abs() < 4 * 0.5 / math.sqrt(weight.numel())
        assert 0.05 < (weight != exact.to(dtype)).double().mean() < 0.45
        assert optimizer.state[weight]["roundings"] == 3

    (before,) = copies([weight])
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    exactly_equal(weight.detach(), before)
