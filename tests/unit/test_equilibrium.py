"""The closed forms, against each other and against numbers worked out by hand."""

import math

import pytest

from hf_rotational import equilibrium


def test_adamw_by_hand() -> None:
    # 2 * 1e-3 * 0.1 * (0.1 / 1.9) = 1.0526e-5, whose root is 3.2444e-3.
    record = equilibrium.adamw(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fan_in=100)
    assert record.rotation == pytest.approx(3.24443e-3, rel=1e-5)
    assert record.norm == pytest.approx(math.sqrt(1e-3 * 100 / 0.2))
    assert record.half_life == pytest.approx(math.log(2) / 2e-4)


@pytest.mark.parametrize(
    "record",
    [
        equilibrium.adamw(lr=1e-3, weight_decay=0.1, fan_in=64),
        equilibrium.sgdm(lr=0.1, weight_decay=1e-4, momentum=0.9, grad_norm=3.0),
        equilibrium.adam_l2(lr=1e-3, weight_decay=0.1, fan_in=64, grad_l1=2.0),
    ],
)
def test_the_angle_is_the_update_over_the_norm(record: equilibrium.Equilibrium) -> None:
    assert record.update_rms is not None
    assert record.norm is not None
    assert record.rotation == pytest.approx(record.update_rms / record.norm)


def test_lion_by_hand() -> None:
    # k^2 = 0.01 + 0.81 * 0.01 / 1.99
    k = math.sqrt(0.01 + 0.81 * 0.01 / 1.99)
    record = equilibrium.lion(lr=1e-4, weight_decay=1.0, fan_in=50)
    assert record.rotation == pytest.approx(math.sqrt(math.pi * 1e-4) * k)
    assert record.norm == pytest.approx(math.sqrt(1e-4 * 50 / math.pi) / k)


def test_without_weight_decay_nothing_settles() -> None:
    record = equilibrium.adamw(lr=1e-3, weight_decay=0.0, fan_in=10)
    assert (record.rotation, record.norm, record.half_life) == (0.0, math.inf, math.inf)


def test_what_cannot_be_known_is_none() -> None:
    assert equilibrium.adamw(lr=1e-3, weight_decay=0.1).norm is None
    assert equilibrium.sgdm(lr=1e-3, weight_decay=0.1).norm is None
    assert equilibrium.adam_l2(lr=1e-3, weight_decay=0.1, fan_in=3).rotation is None
