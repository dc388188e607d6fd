"""The closed forms: against each other, numbers worked out by hand, and the random walk they are about."""

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hf_rotational import RotationalLion, equilibrium
from hf_rotational.equilibrium import Walk, inverse, simulate

FORMS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), "fan_in": 100},
    "adam_l2": {"betas": (0.9, 0.95), "fan_in": 64, "grad_l1": 2.0},
    "sgdm": {"momentum": 0.9, "grad_norm": 3.0},
    "lion": {"betas": (0.9, 0.98), "fan_in": 50},
}
each_form = pytest.mark.parametrize("optim", FORMS)


def form(optim: str) -> Callable[..., equilibrium.Equilibrium[Any]]:
    found: Callable[..., equilibrium.Equilibrium[Any]] = getattr(equilibrium, optim)
    return found


def test_adamw_by_hand() -> None:
    # 2 * 1e-3 * 0.1 * (0.1 / 1.9) = 1.0526e-5, whose root is 3.2444e-3.
    record = equilibrium.adamw(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fan_in=100)
    assert record.rotation == pytest.approx(3.24443e-3, rel=1e-5)
    assert record.norm == pytest.approx(math.sqrt(1e-3 * 100 / 0.2))
    assert record.half_life == pytest.approx(math.log(2) / 2e-4)


def test_sgdm_by_hand() -> None:
    record = equilibrium.sgdm(lr=0.1, weight_decay=1e-4, momentum=0.9, grad_norm=3.0)
    assert record.rotation == pytest.approx(math.sqrt(2e-5 / 1.9))
    assert record.norm == pytest.approx((0.9 / 2e-5) ** 0.25)
    assert record.update_rms == pytest.approx(0.1 * 3 / record.norm / math.sqrt(0.19))
    assert record.half_life == pytest.approx(0.1 * math.log(2) / 4e-5)


@pytest.mark.parametrize("optim", ["adamw", "adam_l2", "sgdm"])
def test_the_angle_is_the_update_over_the_norm(optim: str) -> None:
    # Not Lion's: its update, of signs, is as large as it is; the angle is of a linearised one.
    record = form(optim)(lr=1e-3, weight_decay=0.1, **FORMS[optim])
    assert record.rotation == pytest.approx(record.update_rms / record.norm)


def test_lion_by_hand() -> None:
    # k^2 = 0.01 + 0.81 * 0.01 / 1.99
    k = math.sqrt(0.01 + 0.81 * 0.01 / 1.99)
    record = equilibrium.lion(lr=1e-4, weight_decay=1.0, fan_in=50)
    assert record.rotation == pytest.approx(math.sqrt(math.pi * 1e-4) * k)
    assert record.norm == pytest.approx(math.sqrt(1e-4 * 50 / math.pi) / k)


@each_form
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_without_weight_decay_nothing_settles(optim: str, lr: float) -> None:
    record = form(optim)(lr=lr, weight_decay=0.0, **FORMS[optim])
    assert (record.rotation, record.norm) == (0.0, math.inf)
    assert record.half_life in (math.inf, None)


def test_what_cannot_be_known_is_none() -> None:
    assert equilibrium.adamw(lr=1e-3, weight_decay=0.1).norm is None
    assert equilibrium.sgdm(lr=1e-3, weight_decay=0.1).norm is None
    assert equilibrium.adam_l2(lr=1e-3, weight_decay=0.1, fan_in=3).rotation is None


@each_form
@pytest.mark.parametrize(
    "kind", [np.array, lambda values: torch.tensor(values, dtype=torch.float64)], ids=["numpy", "torch"]
)
def test_arrays_are_numbers_side_by_side(optim: str, kind: Callable[[Any], Any]) -> None:
    lrs, decays = [0.0, 1e-4, 1e-2], [0.0, 0.3]
    momenta = [0.5, 0.9, 0.95]
    name = "momentum" if optim == "sgdm" else "betas"

    def momentum(values: Any) -> dict[str, Any]:
        return {**FORMS[optim], name: values if name == "momentum" else (values, 0.98)}

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by 0 is meant
        record = form(optim)(lr=kind(lrs), weight_decay=kind([[decay] for decay in decays]), **momentum(kind(momenta)))
    for field, array in vars(record).items():
        single = [
            [
                getattr(form(optim)(lr=lr, weight_decay=decay, **momentum(value)), field)
                for lr, value in zip(lrs, momenta, strict=True)
            ]
            for decay in decays
        ]
        if array is None:
            assert set(single[0]) == {None}
        else:
            assert type(array) is type(kind(lrs))
            np.testing.assert_allclose(np.asarray(array), single, rtol=1e-12)


@each_form
def test_numbers_give_plain_floats(optim: str) -> None:
    record = form(optim)(lr=1e-3, weight_decay=1, **FORMS[optim])
    assert {type(value) for value in vars(record).values()} <= {float, type(None)}


def test_every_value_has_the_shape_of_all_arguments() -> None:
    record = equilibrium.adamw(lr=1e-3, weight_decay=0.1, betas=(0.9, np.array([0.9, 0.99])), fan_in=np.ones((3, 1)))
    assert {np.shape(value) for value in vars(record).values()} == {(3, 2)}


@pytest.mark.parametrize(
    ("optim", "changed", "message"),
    [
        ("adamw", {"lr": -1.0}, r"Invalid lr: -1.0 \(must be a finite number >= 0\)"),
        ("sgdm", {"weight_decay": math.nan}, "Invalid weight_decay: nan"),
        ("lion", {"lr": math.inf}, "Invalid lr: inf"),
        ("adamw", {"betas": (1.0, 0.9)}, r"Invalid betas\[0\]: 1.0 \(must be in \[0, 1\)\)"),
        ("lion", {"betas": (0.9, -0.1)}, r"Invalid betas\[1\]: -0.1"),
        ("adam_l2", {"betas": (0.9,)}, r"Invalid betas: \(0.9,\) \(two numbers are needed\)"),
        ("sgdm", {"momentum": 1.0}, "Invalid momentum: 1.0"),
        ("adamw", {"fan_in": 0}, r"Invalid fan_in: 0 \(must be a finite number >= 1\)"),
        ("sgdm", {"grad_norm": -2.0}, "Invalid grad_norm: -2.0"),
        ("adam_l2", {"grad_l1": -2.0}, "Invalid grad_l1: -2.0"),
        ("adamw", {"weight_decay": np.array([[0.1], [-3.0]])}, "Invalid weight_decay: -3.0"),
        ("adamw", {"lr": torch.tensor([math.nan])}, "Invalid lr: nan"),
    ],
)
def test_bad_arguments_are_named(optim: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        form(optim)(**{"lr": 1e-3, "weight_decay": 0.1, **FORMS[optim], **changed})


def test_numbers_need_no_numpy() -> None:
    code = (
        "import sys; from hf_rotational import equilibrium; equilibrium.lion(lr=1e-4, weight_decay=1.0, fan_in=5); "
        "sys.exit('numpy' in sys.modules or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@each_form
@pytest.mark.parametrize("wanted", [1e-3, np.array([1e-3, 2e-2])], ids=["number", "array"])
def test_inverses_give_the_wanted_angle(optim: str, wanted: Any) -> None:
    decay = inverse.weight_decay(optim, rotation=wanted, lr=0.01, **FORMS[optim])
    np.testing.assert_allclose(form(optim)(lr=0.01, weight_decay=decay, **FORMS[optim]).rotation, wanted, rtol=1e-12)
    lr = inverse.lr(optim, rotation=wanted, weight_decay=0.1, **FORMS[optim])
    np.testing.assert_allclose(form(optim)(lr=lr, weight_decay=0.1, **FORMS[optim]).rotation, wanted, rtol=1e-12)
    assert type(lr) is type(decay) is type(wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inverse.lr("adam", rotation=1e-3, weight_decay=0.1), r"Unknown optim: 'adam' \(valid: adamw, adam_l2"),
        (lambda: inverse.lr("adamw", rotation=-1e-3, weight_decay=0.1), "Invalid rotation: -0.001"),
        (lambda: inverse.lr("adamw", rotation=1e-3, weight_decay=0.0), "no finite value .* with weight_decay=0.0"),
        (lambda: inverse.weight_decay("lion", rotation=1e-3, lr=np.array([0.1, 0.0])), "no finite value .* with lr="),
        (lambda: inverse.lr("adam_l2", rotation=1e-3, weight_decay=0.1), "fan_in and grad_l1 are needed"),
    ],
)
def test_what_has_no_inverse_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam_l2": torch.optim.Adam,
    "sgdm": torch.optim.SGD,
    "lion": lambda params, **options: RotationalLion([{"params": params, "rotational": False}], **options),
}


@each_form
def test_the_walk_is_the_plain_optimizers(optim: str) -> None:
    hyperparameters = {name: FORMS[optim][name] for name in ("betas", "momentum") if name in FORMS[optim]}
    walk = simulate(
        optim,
        lr=0.02,
        weight_decay=0.3,
        steps=20,
        fan_in=6,
        neurons=3,
        start_norm=2.0,
        scale_invariant=False,
        seed=5,
        **hyperparameters,
    )
    rng = np.random.default_rng(5)  # the walk's own: first for the weights, then for each step's gradients
    start = torch.from_numpy(rng.standard_normal((3, 6)))
    weight = torch.nn.Parameter(2 * start / start.norm(dim=1, keepdim=True))
    optimizer = TORCH[optim]([weight], lr=0.02, weight_decay=0.3, **hyperparameters)
    for step in range(20):
        before = weight.detach().clone()
        weight.grad = torch.from_numpy(rng.standard_normal((3, 6)))
        optimizer.step()
        cosine = torch.nn.functional.cosine_similarity(before, weight.detach())
        np.testing.assert_allclose(walk.norm[step], weight.detach().norm(dim=1), rtol=1e-9)
        # In float64 the arc cosine is exact to 1e-6 for angles like these.
        np.testing.assert_allclose(walk.rotation[step], cosine.acos(), rtol=1e-6)


def test_gradients_of_scale_invariant_neurons() -> None:
    options = {"lr": 1e-3, "weight_decay": 0.0, "steps": 1, "neurons": 2000, "fan_in": 10}
    near, far = (simulate("sgdm", start_norm=norm, grad_std=0.5, **options) for norm in (1.0, 4.0))
    # Orthogonal to the weight, so that the norm grows by Pythagoras alone; inverse to it, so the angle by its square.
    np.testing.assert_allclose(near.norm, np.sqrt(1 + np.tan(near.rotation) ** 2), rtol=1e-9)
    np.testing.assert_allclose(far.rotation * 16, near.rotation, rtol=1e-5)
    # Nine of ten directions are left; 2000 neurons give their mean square to 1 %.
    assert np.sqrt((near.rotation**2).mean()) == pytest.approx(1e-3 * 0.5 * 3, rel=0.04)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optim": "adam"}, "Unknown optim: 'adam'"),
        ({"steps": 0}, "Invalid steps: 0"),
        ({"start_norm": -1.0}, "Invalid start_norm: -1.0"),
    ],
)
def test_a_walk_that_cannot_be(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(**{"optim": "adamw", "lr": 1e-3, "weight_decay": 0.1, "steps": 5, **changed})


FAN_IN, NEURONS = 128, 48
# Half the entries of a gradient are three times as large as the others: their sum is what Adam+L2's closed form takes.
UNEVEN = np.repeat([0.5, 1.5], FAN_IN // 2)
TANGENT = math.sqrt(1 - 1 / FAN_IN)  # of a gradient, what is left without the direction of the weight
LR, DECAY = 1e-2, 1e-3  # learning rate; times weight decay: its inverse is the time scale of a walk


def settings(optim: str) -> tuple[equilibrium.Equilibrium[Any], dict[str, Any]]:
    """What is predicted, and what is walked."""
    momentum = {"momentum": 0.9} if optim == "sgdm" else {"betas": (0.9, 0.99)}
    weight_decay = DECAY / LR * (0.1 if optim == "sgdm" else 1)  # momentum multiplies what a learning rate does
    sizes = {
        "sgdm": {"grad_norm": math.sqrt(FAN_IN) * TANGENT},
        "adam_l2": {"fan_in": FAN_IN, "grad_l1": float(UNEVEN.sum()) * TANGENT},
    }
    hyperparameters = {"lr": LR, "weight_decay": weight_decay, **momentum}
    predicted = form(optim)(**hyperparameters, **sizes.get(optim, {"fan_in": FAN_IN}))
    walked = {"grad_std": UNEVEN if optim == "adam_l2" else 1.0, "fan_in": FAN_IN, "neurons": NEURONS}
    return predicted, {**hyperparameters, **walked}


def walk(optim: str, start: float, steps: int) -> tuple[Walk, equilibrium.Equilibrium[Any]]:
    """From a multiple of the predicted norm."""
    predicted, walked = settings(optim)
    return simulate(optim, start_norm=start * predicted.norm, steps=steps, **walked), predicted


# Norms of a neuron are 6 % apart (1/sqrt(2 FAN_IN)) and forgotten in 500 steps, so the mean over 48 neurons and 2000
# steps has a standard error of 0.5 %: 3 of them, and terms of the order of DECAY/(1-b1), 1 %. Lion's linearisation is
# off by 3.6 % besides, as DECAY/(1-b2) is 0.1.
@pytest.mark.parametrize(
    ("optim", "tolerance"), [("adamw", 0.025), ("adam_l2", 0.025), ("sgdm", 0.025), ("lion", 0.06)]
)
def test_walks_settle_where_predicted(optim: str, tolerance: float) -> None:
    walked, predicted = walk(optim, start=1.0, steps=2500)
    assert walked.norm[500:].mean() == pytest.approx(predicted.norm, rel=tolerance)
    assert walked.rotation[500:].mean() == pytest.approx(predicted.rotation, rel=tolerance)


@pytest.mark.parametrize(("optim", "power"), [("adamw", 2), ("sgdm", 4), ("lion", 2)])
def test_the_distance_from_equilibrium_halves_in_a_half_life(optim: str, power: int) -> None:
    # From far above, where chance is small beside the distance. Momentum starts at 0 and takes 10 steps to fill (Lion's
    # 100), of 173 or more; a half-life that is wrong by 20 % would leave 44 % or 56 %.
    _, predicted = walk(optim, start=3.0, steps=1)
    walked, _ = walk(optim, start=3.0, steps=round(predicted.half_life))
    left = (np.mean((walked.norm[-1] / predicted.norm) ** power) - 1) / (3.0**power - 1)
    assert left == pytest.approx(0.5, abs=0.03)


def test_adamw_lags_where_the_second_moment_remembers_longer_than_a_half_life() -> None:
    # The condition in its docstring: lr wd = 1-b2 here, and gradients have shrunk since as the norm grew.
    predicted, walked = settings("adamw")
    slow = simulate(
        "adamw", start_norm=0.5 * predicted.norm, steps=round(predicted.half_life), **{**walked, "betas": (0.9, 0.999)}
    )
    left = (np.mean((slow.norm[-1] / predicted.norm) ** 2) - 1) / (0.5**2 - 1)
    assert left > 0.6
