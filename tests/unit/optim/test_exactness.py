"""Every optimizer against the formulas (numpy, float64), and against torch where nothing rotates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_rotational import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD, plan, rotational
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.helpers import TOLERANCE, PlainLion, gradients, noise, train_on
from tests.reference import rotational as reference

LR, WEIGHT_DECAY, STEPS = 3e-3, 0.1, 100
ADAM_BETAS, LION_BETAS = (0.9, 0.95), (0.9, 0.99)


@dataclass(frozen=True)
class Variant:
    """An optimizer, its reference direction and its angle at a learning rate."""

    build: Callable[..., RotationalOptimizer]
    direction: Callable[[], reference.Direction]
    angle: Callable[[float], float]
    momentum: float


def sgd(nesterov: bool = False, dampening: float = 0.0) -> Variant:
    arguments: dict[str, Any] = {"momentum": 0.9, "nesterov": nesterov, "dampening": dampening}
    return Variant(
        lambda params, **options: RotationalSGD(params, **arguments, **options),
        lambda: reference.sgd(**arguments),
        lambda lr: reference.sgd_angle(lr, WEIGHT_DECAY, 0.9),
        0.9,
    )


def adam_angle(lr: float) -> float:
    return reference.adam_angle(lr, WEIGHT_DECAY, ADAM_BETAS)


VARIANTS = {
    "adamw": Variant(
        lambda params, **options: RotationalAdamW(params, betas=ADAM_BETAS, **options),
        lambda: reference.adam(ADAM_BETAS),
        adam_angle,
        0.9,
    ),
    "adam": Variant(
        lambda params, **options: RotationalAdam(params, betas=ADAM_BETAS, **options),
        lambda: reference.adam(ADAM_BETAS, l2=WEIGHT_DECAY),
        adam_angle,
        0.9,
    ),
    "sgd": sgd(),
    "sgd_nesterov": sgd(nesterov=True),
    "sgd_dampening": sgd(dampening=0.5),
    "lion": Variant(
        lambda params, **options: RotationalLion(params, betas=LION_BETAS, **options),
        lambda: reference.lion(LION_BETAS),
        lambda lr: reference.lion_angle(lr, WEIGHT_DECAY, LION_BETAS),
        0.9,
    ),
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def assert_equals_reference(parameter: Tensor, expected: reference.Array, axis: int = 0) -> None:
    found = np.moveaxis(parameter.detach().double().numpy(), axis, 0).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE[parameter.dtype])


@dtypes
@variants
@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
@pytest.mark.parametrize("layer", [nn.Linear(9, 7), Conv1D(7, 9)], ids=["Linear", "Conv1D"])
def test_rows_and_columns(layer: nn.Module, centering: str, variant: Variant, dtype: torch.dtype) -> None:
    # A linear layer stores neurons as rows, Conv1D as columns: the reference sees rows either way.
    axis = 0 if isinstance(layer, nn.Linear) else 1
    layer.weight = nn.Parameter(noise(*layer.weight.shape).to(dtype))
    start = np.moveaxis(layer.weight.detach().double().numpy(), axis, 0).copy()
    grads = gradients(tuple(layer.weight.shape))
    optimizer = variant.build(plan(layer).parameter_groups(), lr=LR, weight_decay=WEIGHT_DECAY, centering=centering)

    train_on(optimizer, {layer.weight: grads}, [LR] * STEPS)

    rows = [np.moveaxis(grad.numpy(), axis, 0) for grad in grads]
    expected = reference.rotate(start, rows, variant.direction(), [variant.angle(LR)] * STEPS, centering)
    assert_equals_reference(layer.weight, expected, axis)


@dtypes
@variants
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("rotation", ["equilibrium", "match", 0.01], ids=str)
def test_angles_follow_a_schedule(rotation: str | float, decay: float, variant: Variant, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(noise(6, 8).to(dtype))
    start = parameter.detach().double().numpy().copy()
    grads = gradients((6, 8))
    lrs = [LR * (step + 1) / 10 if step < 9 else LR * (1 - step / (2 * STEPS)) for step in range(STEPS)]
    # Adam's direction contains the weight decay; the other angles do without.
    weight_decay = WEIGHT_DECAY if rotation == "equilibrium" or variant is VARIANTS["adam"] else 0.0
    optimizer = variant.build([parameter], lr=LR, weight_decay=weight_decay, rotation=rotation, update_norm_decay=decay)

    train_on(optimizer, {parameter: grads}, lrs)

    angle = {
        "equilibrium": variant.angle,
        "match": lambda lr: reference.match_angle(lr, variant.momentum, [start]),
        0.01: lambda lr: 0.01 * lr / LR,
    }[rotation]
    expected = reference.rotate(
        start, [grad.numpy() for grad in grads], variant.direction(), [angle(lr) for lr in lrs], beta=decay
    )
    assert_equals_reference(parameter, expected)


@dtypes
@variants
@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
def test_a_whole_tensor_as_one_neuron(centering: str, variant: Variant, dtype: torch.dtype) -> None:
    parameter = nn.Parameter(noise(3, 4, 5).to(dtype))
    start = parameter.detach().double().numpy().reshape(1, -1).copy()
    grads = gradients((3, 4, 5))
    optimizer = variant.build([parameter], lr=LR, weight_decay=WEIGHT_DECAY, centering=centering, granularity="tensor")
    train_on(optimizer, {parameter: grads}, [LR] * STEPS)
    rows = [grad.numpy().reshape(1, -1) for grad in grads]
    expected = reference.rotate(start, rows, variant.direction(), [variant.angle(LR)] * STEPS, centering)
    assert_equals_reference(parameter.reshape(1, -1), expected)


@variants
def test_groups_keep_their_own_settings(variant: Variant) -> None:
    slow, stack, plain = (nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate([(4, 6), (2, 3, 5), (5,)]))
    starts = [parameter.detach().numpy().copy() for parameter in (slow, stack)]
    optimizer = variant.build(
        [
            {"params": [slow], "lr_factor": 0.1, "centering": "updates", "rotation_scale": 2.0},
            # Stacked experts stored (expert, in, out): a neuron is (expert, out).
            {"params": [stack, plain], "neuron_dims": (0, 2), "update_norm_decay": 0.5, "rotation": 0.02},
        ],
        lr=LR,
        weight_decay=WEIGHT_DECAY,
    )
    grads = {parameter: gradients(tuple(parameter.shape), seed=i) for i, parameter in enumerate((slow, stack, plain))}
    train_on(optimizer, grads, [LR] * STEPS)

    rows = [grad.numpy() for grad in grads[slow]]
    angle = 2 * variant.angle(LR * 0.1)
    expected = reference.rotate(starts[0], rows, variant.direction(), [angle] * STEPS, "updates")
    assert_equals_reference(slow, expected)

    def neurons(array: np.ndarray) -> np.ndarray:
        return array.transpose(0, 2, 1).reshape(-1, 3)

    rows = [neurons(grad.numpy()) for grad in grads[stack]]
    expected = reference.rotate(neurons(starts[1]), rows, variant.direction(), [0.02] * STEPS, beta=0.5)
    assert_equals_reference(stack.transpose(1, 2), expected)


def test_match_takes_the_median_over_the_model() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 8)).double()
    for scale, layer in zip((0.1, 10.0, 0.7), model, strict=True):
        layer.weight = nn.Parameter(scale * noise(*layer.weight.shape))
    angle = reference.match_angle(1e-4, 0.9, [layer.weight.detach().numpy() for layer in model])
    optimizer = RotationalAdamW(plan(model).parameter_groups(), lr=1e-4, rotation="match", weight_decay=0.0)
    train_on(optimizer, {parameter: gradients(tuple(parameter.shape)) for parameter in model.parameters()}, [1e-4] * 3)
    targets = {optimizer.target_rotation(group) for group in optimizer.param_groups if group["rotational"]}
    assert list(targets) == pytest.approx([angle], rel=1e-12)


NESTEROV = {"momentum": 0.9, "nesterov": True}
DAMPED = {"momentum": 0.9, "dampening": 0.5}
PLAIN = {
    "adamw": (RotationalAdamW, torch.optim.AdamW, {"betas": ADAM_BETAS}),
    "adam": (RotationalAdam, torch.optim.Adam, {"betas": ADAM_BETAS}),
    "sgd": (RotationalSGD, torch.optim.SGD, {}),
    "sgd_nesterov": (RotationalSGD, torch.optim.SGD, NESTEROV),
    "sgd_dampening": (RotationalSGD, torch.optim.SGD, DAMPED),
    "lion": (RotationalLion, PlainLion, {"betas": LION_BETAS}),
    "wrapped_nadam": (rotational(torch.optim.NAdam), torch.optim.NAdam, {}),
}


@pytest.mark.parametrize("backend", ["eager", "foreach"])
@pytest.mark.parametrize(("ours", "plain", "arguments"), PLAIN.values(), ids=PLAIN)
def test_what_does_not_rotate_takes_the_plain_step(
    ours: Callable[..., RotationalOptimizer],
    plain: type[torch.optim.Optimizer],
    arguments: dict[str, Any],
    backend: str,
) -> None:
    shapes = [(11, 6), (5,), (5, 6), (1,)]
    mine, theirs = ([nn.Parameter(noise(*shape).float()) for shape in shapes] for _ in range(2))
    groups = [{"params": mine[:1], "rotational": False}, {"params": mine[1:]}]
    optimizer = ours(groups, lr=LR, weight_decay=WEIGHT_DECAY, rotation=0.05, backend=backend, **arguments)
    twin = plain(theirs, lr=LR, weight_decay=WEIGHT_DECAY, **arguments)
    for parameters, one in ((mine, optimizer), (theirs, twin)):
        train_on(one, {parameter: gradients(tuple(parameter.shape)) for parameter in parameters}, [LR] * 50)
    for parameter, other in zip(mine, theirs, strict=True):
        if parameter.shape == (5, 6):
            assert (parameter - other).abs().max() > 1e-3
        else:
            # 50 float32 steps of size lr round at most a few ulp of 1 apart.
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-6)


@variants
@pytest.mark.parametrize(
    "options", [{}, {"centering": "weights"}, {"granularity": "tensor"}, {"transient_correction": True}]
)
def test_foreach_equals_eager(variant: Variant, options: dict[str, Any]) -> None:
    shapes = [(4, 6), (4, 6), (6, 4), (3,), (4, 6), (2, 3, 4)]
    results = []
    for backend in ("eager", "foreach"):
        parameters = [nn.Parameter(noise(*shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizer = variant.build(parameters, lr=LR, weight_decay=WEIGHT_DECAY, backend=backend, **options)
        grads = {p: gradients(tuple(p.shape), seed=i) for i, p in enumerate(parameters)}
        train_on(optimizer, grads, [LR] * 20)
        # A tensor that misses steps leaves those it was stacked with.
        parameters[1].grad = None
        optimizer.step()
        train_on(optimizer, grads, [LR] * 5)
        results.append(parameters)
    for eager, foreach in zip(*results, strict=True):
        # Stacked rows may be summed in another order.
        torch.testing.assert_close(foreach, eager, rtol=0, atol=1e-12)


def test_norms_are_held_over_200_float32_steps() -> None:
    layer = nn.Linear(64, 32)
    start = layer.weight.detach().norm(dim=1)
    optimizer = RotationalAdamW([layer.weight], lr=1e-2, weight_decay=0.5)
    train_on(optimizer, {layer.weight: gradients((32, 64), steps=200)}, [1e-2] * 200)
    assert (layer.weight.norm(dim=1) / start - 1).abs().max() < 1e-5


@variants
@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
def test_weights_wait_for_the_first_step_that_moves(centering: str, variant: Variant) -> None:
    parameter = nn.Parameter(noise(4, 6))
    start = parameter.detach().clone()
    optimizer = variant.build([parameter], lr=LR, weight_decay=WEIGHT_DECAY, centering=centering)
    assert torch.equal(parameter, start)
    assert not optimizer.state
    train_on(optimizer, {parameter: gradients((4, 6))}, [0.0])
    assert torch.equal(parameter, start)
    assert optimizer.state[parameter]
    train_on(optimizer, {parameter: gradients((4, 6))}, [LR])
    assert not torch.equal(parameter, start)
    if centering == "weights":
        assert parameter.mean(dim=1).abs().max() < 1e-12
