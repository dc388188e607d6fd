"""Random walks: optimizers as they are settle where the closed forms say, rotational ones are there from the start.

Gradients are independent normal ones for AdamW and Lion, whose updates do not depend on their size. SGD's and Adam+L2's
closed forms are about scale-invariant neurons: there gradients are orthogonal to the weight and inverse to its norm.

Short walks run with the other tests. Long ones, with smaller steps and tighter tolerances, are marked slow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.random_walk import Gradient, independent, scale_invariant, walk
from benchmarks.transient import relative_angles
from hf_rotational import RotationalLion, equilibrium
from hf_rotational.equilibrium import Equilibrium

LR, BETAS, MOMENTUM, FAN_IN = 1e-2, (0.9, 0.99), 0.9, 128


@dataclass(frozen=True)
class Length:
    """How long a walk is, and how close it comes."""

    neurons: int
    decay: float
    """Learning rate times weight decay: its inverse is the time scale of a walk."""
    tolerance: float


# 3 standard errors of the mean norm (0.5 % and 0.2 %), and what the closed forms leave out: terms of the order of
# decay/(1-b1), which are 1 % and 0.2 %, and of 1/FAN_IN, below 1 %.
SHORT = Length(neurons=64, decay=1e-3, tolerance=0.03)
LONG = Length(neurons=256, decay=2e-4, tolerance=0.015)
any_length = pytest.mark.parametrize(
    "length", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)


@dataclass(frozen=True)
class Settling:
    """A free-running optimizer and what it should settle to."""

    make: Callable[[list[Tensor]], Optimizer]
    predicted: Equilibrium
    gradient: Gradient
    half_life: float
    power: int = 2
    """Of the norm, whose distance from equilibrium halves in a half-life."""


def adamw(length: Length) -> Settling:
    weight_decay = length.decay / LR
    predicted = equilibrium.adamw(lr=LR, weight_decay=weight_decay, betas=BETAS, fan_in=FAN_IN)
    return Settling(
        make=lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=weight_decay, betas=BETAS),
        predicted=predicted,
        gradient=independent(),
        half_life=known(predicted.half_life),
    )


def sgd(length: Length) -> Settling:
    # Momentum multiplies what a learning rate does.
    weight_decay = length.decay * (1 - MOMENTUM) / LR
    predicted = equilibrium.sgdm(
        lr=LR,
        weight_decay=weight_decay,
        momentum=MOMENTUM,
        grad_norm=math.sqrt(FAN_IN - 1),  # of FAN_IN normal entries, one direction is taken out
    )
    return Settling(
        make=lambda params: torch.optim.SGD(params, lr=LR, weight_decay=weight_decay, momentum=MOMENTUM),
        predicted=predicted,
        gradient=scale_invariant(),
        half_life=known(predicted.half_life),
        power=4,
    )


def lion(weight_decay: float, beta2: float) -> Settling:
    betas = (BETAS[0], beta2)
    predicted = equilibrium.lion(lr=LR, weight_decay=weight_decay, betas=betas, fan_in=FAN_IN)
    return Settling(
        # Lion itself: nothing rotates.
        make=lambda params: RotationalLion(
            [{"params": params, "rotational": False}], lr=LR, weight_decay=weight_decay, betas=betas
        ),
        predicted=predicted,
        gradient=independent(),
        half_life=known(predicted.half_life),
    )


def adam_l2(length: Length, scale: float) -> Settling:
    weight_decay = length.decay / LR
    # Entries of two sizes, as their sum enters the closed form, which is not FAN_IN times their root mean square.
    sizes = scale * torch.tensor([0.5, 1.5]).repeat(FAN_IN // 2)
    predicted = equilibrium.adam_l2(
        lr=LR, weight_decay=weight_decay, betas=BETAS, fan_in=FAN_IN, grad_l1=float(sizes.sum())
    )
    # There is no closed form: this is AdamW's in terms of its angle, times 1.5 for the larger entries, the slower ones.
    half_life = 1.5 * math.log(2) * (1 - BETAS[0]) / (1 + BETAS[0]) / known(predicted.rotation) ** 2
    return Settling(
        make=lambda params: torch.optim.Adam(params, lr=LR, weight_decay=weight_decay, betas=BETAS),
        predicted=predicted,
        gradient=scale_invariant(scale=sizes),
        half_life=half_life,
    )


def known(value: float | None) -> float:
    assert value is not None
    return value


@dataclass(frozen=True)
class Settled:
    """What a walk came to, relative to what was predicted."""

    norm: float
    rotation: float
    distance_after_half_life: float


def settle(settling: Settling, neurons: int) -> Settled:
    """Walks from 1.5 times the predicted norm for 6 half-lives, which leave 1 % of that; then measures for 6 more."""
    norm, power = known(settling.predicted.norm), settling.power
    start = torch.randn(neurons, FAN_IN, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(start * (1.5 * norm / start.norm(dim=1, keepdim=True)))
    half_life = round(settling.half_life)
    angles, norms, powers = [], [], []
    for angle in walk(settling.make([weight]), weight, settling.gradient, 12 * half_life):
        lengths = weight.detach().norm(dim=1) / norm
        angles.append(angle.mean())
        norms.append(lengths.mean())
        powers.append(lengths.pow(power).mean())
    return Settled(
        norm=float(torch.stack(norms)[6 * half_life :].mean()),
        rotation=float(torch.stack(angles)[6 * half_life :].mean()) / known(settling.predicted.rotation),
        distance_after_half_life=float(powers[half_life - 1] - 1) / (1.5**power - 1),
    )


@any_length
@pytest.mark.parametrize("optimizer", [adamw, sgd])
def test_adamw_and_sgd_settle(optimizer: Callable[[Length], Settling], length: Length) -> None:
    settled = settle(optimizer(length), length.neurons)
    assert settled.norm == pytest.approx(1, rel=length.tolerance)
    assert settled.rotation == pytest.approx(1, rel=length.tolerance)
    # Momentum, of 10 steps, lags behind the 173 or more of a half-life.
    assert settled.distance_after_half_life == pytest.approx(0.5, rel=0.08)


@any_length
def test_lion_settles_where_its_linearisation_holds(length: Length) -> None:
    # For lr * weight_decay << 1 - b2: here a fiftieth. The error left, of either sign, is what 5 % is for.
    settled = settle(lion(length.decay / LR, beta2=1 - 50 * length.decay), length.neurons)
    assert settled.norm == pytest.approx(1, rel=0.05)
    assert settled.rotation == pytest.approx(1, rel=0.05)
    assert settled.distance_after_half_life == pytest.approx(0.5, rel=0.08)


def test_lions_closed_form_is_off_where_its_linearisation_fails() -> None:
    # lr * weight_decay = 1 - b2: the signs follow a momentum that is about as old as the walk remembers.
    settled = settle(lion(0.01 / LR, beta2=0.99), SHORT.neurons)
    assert settled.norm < 0.8
    assert settled.rotation > 1.2


@any_length
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_adam_with_l2_settles_where_the_gradients_size_says(scale: float, length: Length) -> None:
    settled = settle(adam_l2(length, scale), length.neurons)
    assert settled.norm == pytest.approx(1, rel=length.tolerance)
    assert settled.rotation == pytest.approx(1, rel=length.tolerance)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Lion", "Adam"])
@pytest.mark.parametrize(
    ("steps", "tolerance"),
    [
        # Room for AdamW's transient without the correction: 2 % of the mean of 500 steps, 0.3 % of that of 5000.
        pytest.param(500, 0.03, id="short"),
        pytest.param(5000, 0.005, id="long", marks=pytest.mark.slow),
    ],
)
def test_rotational_optimizers_turn_by_the_target(
    optimizer: str, correction: bool, steps: int, tolerance: float
) -> None:
    angles = relative_angles(optimizer, correction=correction, neurons=64, steps=steps)
    assert float(angles.mean()) == pytest.approx(1, rel=tolerance)
    # From step 100 on there is no transient left, nor what a mean could hide.
    assert float(angles[100:].mean()) == pytest.approx(1, rel=0.005)


def adamw_size_sq(step: int) -> float:
    return (1 + BETAS[0] ** step) / (1 - BETAS[0] ** step)


def sgd_size_sq(step: int) -> float:
    return 1 - MOMENTUM ** (2 * step)


@pytest.mark.parametrize(
    ("optimizer", "size_sq", "step", "published"),
    [("AdamW", adamw_size_sq, 10, 0.67), ("SGD", sgd_size_sq, 3, 1.17)],
)
def test_early_steps_are_off_target_as_published(
    optimizer: str, size_sq: Callable[[int], float], step: int, published: float
) -> None:
    angles = relative_angles(optimizer, steps=20)
    assert float(angles[step - 1]) == pytest.approx(published, abs=0.01)
    # The update's expected size over the root of the running average of its square, decay 0.9.
    expected, average_sq = [], 0.0
    for t in range(1, 21):
        average_sq = 0.9 * average_sq + 0.1 * size_sq(t)
        expected.append(math.sqrt(size_sq(t) * (1 - 0.9**t) / average_sq))
    # The mean over 256 neurons has a standard error of 0.3 %.
    assert angles.tolist() == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    # Adam's second moment sees the L2 term and its first does not, so its first steps have outliers.
    [("AdamW", 0.015), ("SGD", 0.015), ("Lion", 0.015), ("Adam", 0.05)],
)
def test_transient_correction_brings_each_of_the_first_steps_to_the_target(optimizer: str, tolerance: float) -> None:
    angles = relative_angles(optimizer, correction=True, steps=20)
    assert angles.tolist() == pytest.approx([1.0] * 20, rel=tolerance)


def test_transient_correction_is_for_independent_gradients() -> None:
    as_published = relative_angles("AdamW", gradients="constant", steps=20)
    corrected = relative_angles("AdamW", gradients="constant", correction=True, steps=20)
    assert as_published.tolist() == pytest.approx([1.0] * 20, rel=0.01)
    assert corrected[1:].min() > 1.1
