"""Measured angles."""

import math

import pytest
import torch

from hf_rotational.monitor.measure import neuron_angles


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 0.1, 3.0])
def test_small_angles_are_not_lost(angle: float) -> None:
    # float32's own acos(u.v) reads 0 for the first two.
    before = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    after = torch.tensor([[math.cos(angle), math.sin(angle)], [0.0, 3.0]])
    assert neuron_angles(before, after, (1,)).tolist() == pytest.approx([angle, 0.0], rel=1e-4)


def test_neurons_without_direction_are_left_out() -> None:
    before, after = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])[..., None].mT, torch.ones(2, 1, 3)
    before[1] = 0.0
    assert neuron_angles(before, after, (1, 2)).shape == (1,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_neurons_that_are_not_finite_are_left_out(value: float) -> None:
    before, after = torch.ones(2, 3), torch.ones(2, 3)
    after[1] = value
    assert neuron_angles(before, after, (1,)).tolist() == [0.0]
    assert neuron_angles(after, before, (1,)).tolist() == [0.0]
