"""What was found wrong in the published code (epfml/REQ), number by number: docs/published-code.md has the list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from hf_rotational import RotationalAdamW, RotationalSGD, plan, rotational
from hf_rotational.monitor.measure import neuron_angles
from tests.helpers import LR, gradients, noise, train_on

BOTH = pytest.mark.parametrize(
    "optimizer_class", [RotationalAdamW, rotational(torch.optim.AdamW)], ids=["own", "wrapped"]
)


def step_once(optimizer: torch.optim.Optimizer, *parameters: nn.Parameter) -> None:
    train_on(optimizer, {parameter: gradients(tuple(parameter.shape)) for parameter in parameters}, [LR])


def measured_angles(optimizer: torch.optim.Optimizer, matrix: nn.Parameter, grads: list[Tensor]) -> list[float]:
    """Mean angle of each step over the rows of a matrix."""
    angles = []
    for grad in grads:
        before = matrix.detach().clone()
        matrix.grad = grad
        optimizer.step()
        angles.append(float(neuron_angles(before, matrix.detach(), (1,)).mean()))
    return angles


@BOTH
def test_01_a_parameter_without_a_gradient_waits(optimizer_class: Any) -> None:
    first, second = nn.Parameter(noise(3, 4)), nn.Parameter(noise(3, 4))
    optimizer = optimizer_class([first, second], lr=LR)
    step_once(optimizer, first)
    assert torch.equal(second, noise(3, 4))
    step_once(optimizer, first, second)
    assert not torch.equal(second, noise(3, 4))


@BOTH
def test_02_a_closure_is_called_with_gradients_on(optimizer_class: Any) -> None:
    matrix = nn.Parameter(noise(3, 4))
    optimizer = optimizer_class([matrix], lr=LR)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = matrix.square().sum()
        loss.backward()
        return loss

    expected = matrix.detach().square().sum()
    assert torch.equal(optimizer.step(closure), expected)


@BOTH
def test_03_rows_of_zeros_and_rows_without_gradient_stay_finite(optimizer_class: Any) -> None:
    start = noise(4, 5)
    start[1:3] = 0.0
    matrix = nn.Parameter(start.clone())
    optimizer = optimizer_class([matrix], lr=LR, weight_decay=0.1, centering="updates")
    grads = gradients((4, 5))
    for grad in grads:
        grad[2] = 0.0
    train_on(optimizer, {matrix: grads}, [LR] * 10)
    assert matrix.isfinite().all()
    assert torch.equal(matrix[2], torch.zeros(5, dtype=torch.float64))
    assert (matrix[1] != 0).all()


def test_04_unknown_keyword_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="zero_mean"):
        RotationalAdamW([nn.Parameter(noise(3, 4))], zero_mean=True)  # type: ignore[call-arg]


def test_05_bad_values_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        RotationalAdamW([nn.Parameter(noise(3, 4))], lr=-1)
    with pytest.raises(ValueError, match="Invalid optimizer: Linear"):
        rotational(nn.Linear)  # type: ignore[type-var]


def test_06_what_was_measured_at_the_start_is_not_measured_again_after_loading() -> None:
    matrix = nn.Parameter(noise(3, 4))
    optimizer = RotationalAdamW([matrix], lr=LR, rotation="match")
    step_once(optimizer, matrix)
    norm, rms = optimizer.state[matrix]["norm"].clone(), optimizer.param_groups[0]["match_rms"]

    grown = nn.Parameter(3 * matrix.detach())
    resumed = RotationalAdamW([grown], lr=LR, rotation="match")
    resumed.load_state_dict(optimizer.state_dict())
    step_once(resumed, grown)

    assert torch.equal(resumed.state[grown]["norm"], norm)
    assert resumed.param_groups[0]["match_rms"] == rms
    torch.testing.assert_close(grown.norm(dim=1, keepdim=True), norm, rtol=1e-12, atol=0.0)


def test_07_small_angles_are_measured() -> None:
    # An arc cosine in float32 reads 0 here.
    before = torch.tensor([[1.0, 0.0, 0.0]])
    assert neuron_angles(before, torch.tensor([[1.0, 1e-5, 0.0]]), (1,)).item() == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_08_bfloat16_weights_move_at_small_angles(rounding: str) -> None:
    generator = torch.Generator().manual_seed(1)
    # Noise around a direction, so that 50 steps of 1e-4 add up to a distance that bfloat16 can show.
    drift = torch.randn(64, 64, generator=generator)
    grads = [drift + 0.1 * torch.randn(64, 64, generator=generator) for _ in range(50)]
    start = noise(64, 64).bfloat16()
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = nn.Parameter(start.to(dtype, copy=True))
        optimizer = RotationalAdamW([matrix], lr=LR, rotation=1e-4, weight_decay=0.0, rounding=rounding)
        train_on(optimizer, {matrix: grads}, [LR] * 50)
        moved.append(matrix.detach().float() - start.float())
    exact, rounded = moved
    # 4096 entries average what rounding adds to the way that float32 goes; to nearest, 0.2 of it is left.
    assert (rounded * exact).sum() / exact.square().sum() == pytest.approx(1.0, abs=0.05)
    norms = (start.float() + rounded).norm(dim=1) / start.float().norm(dim=1)
    assert abs(norms.mean() - 1) < 1e-4


def test_09_construction_and_loading_leave_the_weights_alone() -> None:
    matrix = nn.Parameter(noise(3, 4))
    optimizer = RotationalAdamW([matrix], centering="weights")
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(matrix, noise(3, 4))
    step_once(optimizer, matrix)
    moved = matrix.detach().clone()
    resumed = RotationalAdamW([matrix], centering="weights")
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(matrix, moved)
    assert resumed.state[matrix]["centered"] is True


@pytest.mark.parametrize(
    ("optimizer_class", "arguments", "step", "published"),
    [(RotationalAdamW, {}, 10, 0.67), (RotationalSGD, {"momentum": 0.9}, 3, 1.17)],
    ids=["adamw", "sgd"],
)
def test_10_early_rotation_can_be_corrected(
    optimizer_class: Any, arguments: dict[str, Any], step: int, published: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(512, 64, generator=generator, dtype=torch.float64) for _ in range(step)]
    ratios = []
    for corrected in (False, True):
        matrix = nn.Parameter(noise(512, 64))
        optimizer = optimizer_class(
            [matrix], lr=LR, rotation=1e-3, weight_decay=0.0, transient_correction=corrected, **arguments
        )
        ratios.append(measured_angles(optimizer, matrix, grads)[-1] / 1e-3)
    # 512 neurons of 64 entries leave the mean angle an error of about 0.5 %.
    assert ratios == [pytest.approx(published, abs=0.02), pytest.approx(1.0, abs=0.03)]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_11_a_neuron_without_gradient_comes_to_rest(decay: float) -> None:
    matrix = nn.Parameter(noise(2, 16))
    optimizer = RotationalAdamW([matrix], lr=LR, rotation=0.01, weight_decay=0.0, update_norm_decay=decay)
    grads = gradients((2, 16))
    for grad in grads[20:]:
        grad[0] = 0.0
    train_on(optimizer, {matrix: grads}, [LR] * 70)
    before = matrix.detach().clone()
    train_on(optimizer, {matrix: grads[70:]}, [LR])
    stale, live = neuron_angles(before, matrix.detach(), (1,)).tolist()
    # 50 steps of momentum 0.9 leave 0.5 % of it.
    assert stale < 0.01 * 0.01
    assert live > 0.5 * 0.01


def test_12_neurons_that_are_not_rows_are_found() -> None:
    layer = Conv1D(3, 5).double()
    norms = layer.weight.detach().norm(dim=0)
    optimizer = RotationalAdamW(plan(layer).parameter_groups(), lr=0.1, weight_decay=0.5)
    train_on(optimizer, {layer.weight: gradients((5, 3))}, [0.1] * 20)
    torch.testing.assert_close(layer.weight.norm(dim=0), norms, rtol=1e-12, atol=0.0)


def test_13_the_number_of_calls_does_not_grow_with_the_number_of_layers() -> None:
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # Views launch nothing; lists are stacked and split once, whatever their length.
            self.calls += (
                func.namespace == "aten" and not func.is_view and func is not torch.ops.aten._local_scalar_dense.default
            )
            return func(*args, **(kwargs or {}))

    calls = []
    for layers in (2, 20):
        matrices = [nn.Parameter(noise(4, 6)) for _ in range(layers)]
        optimizer = RotationalAdamW(matrices, lr=LR, backend="foreach")
        step_once(optimizer, *matrices)
        for matrix in matrices:
            matrix.grad = noise(4, 6)
        with Count() as count:
            optimizer.step()
        calls.append(count.calls)
    assert calls[0] == calls[1]


def test_14_nesterov_can_be_wrapped() -> None:
    matrices = [nn.Parameter(noise(3, 4)) for _ in range(2)]
    for matrix, nesterov in zip(matrices, (False, True), strict=True):
        optimizer = rotational(torch.optim.SGD)([matrix], lr=LR, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
        train_on(optimizer, {matrix: gradients((3, 4))}, [LR] * 5)
    assert not torch.allclose(*matrices)


@BOTH
def test_15_neurons_rotate_without_weight_decay_and_misuse_is_an_error(optimizer_class: Any) -> None:
    matrix = nn.Parameter(noise(3, 4))
    step_once(optimizer_class([matrix], lr=LR, weight_decay=0.0, rotation=0.01), matrix)
    angles = neuron_angles(noise(3, 4), matrix.detach(), (1,))
    torch.testing.assert_close(angles, torch.full_like(angles, 0.01).atan(), rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="makes the target angle 0"):
        optimizer_class([matrix], lr=LR, weight_decay=0.0)
