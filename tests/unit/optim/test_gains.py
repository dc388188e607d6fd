"""Learned gains and means: the same numbers as parameters of the module, over plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_rotational import RotationalAdamW, RotationalSGD, rotational
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.helpers import (
    LR,
    WEIGHT_DECAY,
    WRITTEN_OUT,
    copies,
    each_backend,
    exactly_equal,
    gradients,
    make,
    noise,
    train,
    train_on,
    turned,
)
from tests.reference import rotational as reference

each_written_out = pytest.mark.parametrize("build", WRITTEN_OUT.values(), ids=WRITTEN_OUT)
STEPS = 100
BETAS = (0.9, 0.99)
DIRECTIONS: dict[str, Callable[[], reference.Direction]] = {
    "AdamW": lambda: reference.adam((0.9, 0.999)),
    "momentum": lambda: reference.sgd(0.9),
    "Lion": lambda: reference.lion(BETAS),
}


def loss(weight: Tensor, step: int) -> Tensor:
    """A regression, with noise that moves the gains about."""
    inputs, targets = noise(50, weight.shape[1], seed=3), noise(50, weight.shape[0], seed=4)
    return (inputs @ weight.T - targets).square().mean() + 0.3 * (weight * noise(*weight.shape, seed=step)).sum()


@each_backend
@pytest.mark.parametrize("scale", [1.0, 0.03])
@each_written_out
def test_equals_a_gain_in_the_module(build: Callable[..., RotationalOptimizer], scale: float, backend: str) -> None:
    plain = nn.Parameter(scale * noise(6, 8))
    gain = nn.Parameter(plain.detach().norm(dim=1, keepdim=True))
    direction = nn.Parameter(plain.detach() / gain.detach())
    optimizer = make(build, [plain], gains="learned", backend=backend)
    module = make(
        build, [{"params": [direction]}, {"params": [gain], "rotational": False, "weight_decay": 0.0}], backend=backend
    )
    turned_over = 0
    for step in range(STEPS):
        for weight, one in ((plain, optimizer), (gain * direction, module)):
            one.zero_grad()
            loss(weight, step).backward()
            one.step()
        turned_over += int((gain < 0).sum())
        torch.testing.assert_close(plain, gain * direction, rtol=0.0, atol=1e-10)
    # Small neurons have gains that pass through 0 in a few steps, where it matters that directions are not lost.
    assert bool(turned_over) == (scale < 1)
    exactly_equal(optimizer.state[plain]["norm"], optimizer.state[plain]["gain"].abs())


@each_backend
@pytest.mark.parametrize("options", [{}, {"gain_lr_multiplier": 3.0, "gain_weight_decay": 0.2}], ids=["plain", "own"])
@pytest.mark.parametrize("centering", ["none", "learned"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_equals_the_formulas(name: str, centering: str, options: dict[str, float], backend: str) -> None:
    # Neurons are columns, as Conv1D stores them; two of a shape, which the foreach backend joins.
    parameters = [nn.Parameter(noise(8, 6, seed=seed)) for seed in (0, 1)]
    starts = [parameter.detach().numpy().T.copy() for parameter in parameters]
    grads = [gradients((6, 8), seed=seed) for seed in (2, 3)]
    lrs = [LR * (1 - step / (2 * STEPS)) for step in range(STEPS)]
    group = {"params": parameters, "neuron_dims": (1,)}
    settings = {"gains": "learned", "centering": centering, "rotation": 0.02, "backend": backend}
    optimizer = make(WRITTEN_OUT[name], [group], **settings, **options)
    columns = [[grad.T for grad in series] for series in grads]
    train_on(optimizer, dict(zip(parameters, columns, strict=True)), lrs)

    decay = options.get("gain_weight_decay", 0.0)
    for parameter, start, series in zip(parameters, starts, grads, strict=True):
        expected = reference.rotate_and_learn(
            start,
            [grad.numpy() for grad in series],
            DIRECTIONS[name],
            [0.02 * lr / LR for lr in lrs],
            [options.get("gain_lr_multiplier", 1.0) * lr for lr in lrs],
            **{"l2" if name == "momentum" else "decay": decay},
            free_mean=centering == "learned",
        )
        np.testing.assert_allclose(parameter.detach().numpy().T, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"centering": "weights"}], ids=str)
@pytest.mark.parametrize("build", [RotationalAdamW, RotationalSGD])
def test_gains_without_a_learning_rate_are_fixed_norms(
    build: Callable[..., RotationalOptimizer], options: dict[str, str]
) -> None:
    learned, fixed = (nn.Parameter(noise(5, 7)) for _ in range(2))
    # Without eps nothing depends on the size of the gradient, which the gain multiplies.
    settings = {"rotation": 0.05, "rotational_eps": 0.0, **options} | ({"eps": 0.0} if build is RotationalAdamW else {})
    for parameter, gains in ((learned, {"gains": "learned", "gain_lr_multiplier": 0.0}), (fixed, {})):
        train(make(build, [parameter], **settings, **gains), [parameter], range(20))
    torch.testing.assert_close(learned, fixed, rtol=0.0, atol=1e-12)


def test_with_a_learned_mean_the_rest_turns_by_the_angle() -> None:
    parameter = nn.Parameter(noise(5, 7) + 2.0)
    start = parameter.detach().clone()
    optimizer = make(RotationalAdamW, [parameter], centering="learned", rotation=0.05)
    train(optimizer, [parameter], [0])
    centred = [weight - weight.mean(dim=1, keepdim=True) for weight in (start, parameter.detach())]
    torch.testing.assert_close(turned(*centred), torch.full((5,), 0.05, dtype=torch.float64).atan(), rtol=0, atol=1e-8)
    torch.testing.assert_close(centred[1].norm(dim=1), centred[0].norm(dim=1), rtol=1e-12, atol=0.0)
    # Adam's first step is as long as the learning rate.
    moved = (parameter.detach() - start).mean(dim=1).abs()
    torch.testing.assert_close(moved, torch.full((5,), LR, dtype=torch.float64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_gain_that_lands_on_0_keeps_its_direction(dtype: torch.dtype) -> None:
    start = torch.tensor([[3.0, 4.0, 0.0], [0.0, 3.0, 4.0]])
    parameter = nn.Parameter(start.to(dtype, copy=True))
    optimizer = RotationalSGD([parameter], lr=1.0, rotation=1e-12, gains="learned")
    # Along the first neuron, as long as its gain and then a fifth of it; nothing for the second.
    for factor in (1.0, 0.2):
        parameter.grad = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]).to(dtype) * factor
        optimizer.step()
        expected = {1.0: 0.0, 0.2: -0.2}[factor]
        tolerance = torch.finfo(dtype).eps
        assert optimizer.state[parameter]["gain"][0].item() == pytest.approx(5 * expected, abs=20 * tolerance)
        torch.testing.assert_close(parameter[0].float(), expected * start[0], rtol=0.0, atol=20 * tolerance)
        exactly_equal(parameter[1].float(), start[1])


def test_neurons_of_norm_0_take_the_plain_step_and_learn_no_gain() -> None:
    learned, fixed = (nn.Parameter(noise(3, 4)) for _ in range(2))
    for parameter in (learned, fixed):
        parameter.data[1] = 0.0
    for parameter, gains in ((learned, "learned"), (fixed, "fixed")):
        train(make(RotationalAdamW, [parameter], gains=gains), [parameter], range(10))
    exactly_equal(learned[1], fixed[1])
    assert learned.isfinite().all()
    assert not torch.equal(learned[0], fixed[0])


@pytest.mark.parametrize("centering", ["none", "updates", "weights", "learned"])
def test_at_learning_rate_0_weights_stay_bit_for_bit(centering: str) -> None:
    parameter = nn.Parameter(noise(5, 7, dtype=torch.float32))
    start = parameter.detach().clone()
    optimizer = make(RotationalAdamW, [parameter], gains="learned", centering=centering)
    train_on(optimizer, {parameter: gradients((5, 7))}, [0.0, 0.0])
    exactly_equal(parameter.detach(), start)
    assert optimizer.state[parameter]["gain_step"] == 2
    exactly_equal(optimizer.state[parameter]["gain"], optimizer.state[parameter]["norm"])


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_16_bit_weights_follow_float32_ones(rounding: str) -> None:
    narrow = nn.Parameter(noise(32, 64, dtype=torch.bfloat16))
    wide = nn.Parameter(narrow.detach().float())
    settings = {"gains": "learned", "centering": "learned", "lr": 1e-3, "rotation": 1e-3}
    train(make(RotationalAdamW, [narrow], rounding=rounding, **settings), [narrow], range(50), factor=0.125)
    # The same gradients: 16-bit noise is that of the wide one, rounded.
    twin = make(RotationalAdamW, [wide], **settings)
    for step in range(50):
        wide.grad = (0.125 * noise(32, 64, seed=1000 * (step + 1), dtype=torch.bfloat16)).float()
        twin.step()
    # A bfloat16 rounds to 1 in 256; Kahan's weights end rounded once, stochastic ones have walked.
    limit = {"kahan": 1.0, "stochastic": 8.0}[rounding] / 256
    error = (narrow.float() - wide).norm(dim=1) / wide.norm(dim=1)
    assert error.max() < limit
    moved = (wide - noise(32, 64, dtype=torch.bfloat16).float()).norm(dim=1) / wide.norm(dim=1)
    assert moved.min() > 2 / 256


def test_an_older_checkpoint_starts_to_learn_where_its_norms_are() -> None:
    parameter = nn.Parameter(noise(5, 7))
    optimizer = make(RotationalAdamW, [parameter])
    train(optimizer, [parameter], range(5))
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("gains", "gain_lr_multiplier", "gain_weight_decay"):
        del saved["param_groups"][0][name]
    before = copies([parameter])[0]
    loaded = make(RotationalAdamW, [parameter], gains="learned")
    loaded.load_state_dict(saved)
    train(loaded, [parameter], [5])
    change = parameter.detach().norm(dim=1) - before.norm(dim=1)
    torch.testing.assert_close(change.abs(), torch.full((5,), LR, dtype=torch.float64), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("options", [{"gains": "learned"}, {"centering": "learned"}])
def test_wrapped_optimizers_name_the_other_way(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rotational\(NAdam\) cannot.*hf_rotational\.standardize\(model"):
        rotational(torch.optim.NAdam)([nn.Parameter(noise(3, 4))], weight_decay=WEIGHT_DECAY, **options)
