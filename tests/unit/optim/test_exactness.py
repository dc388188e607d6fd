"""The optimizers against the formulas (float64, numpy) and against torch where nothing rotates."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_rotational import RotationalAdamW, plan
from tests.reference import rotational as reference

LR, WEIGHT_DECAY, BETAS, STEPS = 3e-3, 0.1, (0.9, 0.95), 50


def gradients(shape: tuple[int, ...], seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Rows whose gradients differ by orders of magnitude, with a mean, as real ones do.
    scale = 10.0 ** torch.arange(-3, shape[0] - 3, dtype=torch.float64).clamp(max=2).view(-1, *[1] * (len(shape) - 1))
    return [scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3) for _ in range(STEPS)]


def run(optimizer: torch.optim.Optimizer, weight: torch.Tensor, grads: list[torch.Tensor]) -> None:
    for grad in grads:
        weight.grad = grad.to(weight.dtype)
        optimizer.step()


@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
@pytest.mark.parametrize("layer", [nn.Linear(9, 7), Conv1D(7, 9)], ids=["Linear", "Conv1D"])
def test_equals_the_formulas_in_float64(layer: nn.Module, centering: str) -> None:
    torch.manual_seed(0)
    layer = type(layer)(*(9, 7) if isinstance(layer, nn.Linear) else (7, 9)).double()
    # A linear layer stores neurons as rows, Conv1D as columns: the reference sees rows either way.
    axis = 0 if isinstance(layer, nn.Linear) else 1
    start = np.moveaxis(layer.weight.detach().numpy(), axis, 0).copy()
    grads = gradients(tuple(layer.weight.shape))
    optimizer = RotationalAdamW(
        plan(layer).parameter_groups(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, centering=centering
    )

    run(optimizer, layer.weight, grads)

    expected = reference.rotate(
        start,
        reference.adamw([np.moveaxis(grad.numpy(), axis, 0) for grad in grads], BETAS),
        [reference.adamw_angle(LR, WEIGHT_DECAY, BETAS)] * STEPS,
        centering,
    )
    np.testing.assert_allclose(np.moveaxis(layer.weight.detach().numpy(), axis, 0), expected, rtol=1e-10, atol=1e-12)


def test_what_does_not_rotate_takes_torch_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    twin = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5))
    twin.load_state_dict(model.state_dict())
    optimizer = RotationalAdamW(plan(model).parameter_groups(), lr=LR, weight_decay=WEIGHT_DECAY)
    decayed = [parameter for parameter in twin.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in twin.parameters() if parameter.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=LR, weight_decay=WEIGHT_DECAY
    )

    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        plain.step()

    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name == "1.weight":
            assert (ours - theirs).abs().max() > 1e-3
        else:
            # 50 float32 steps of size lr round at most a few ulp of 1 apart.
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_norms_are_held_over_200_float32_steps() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    start = layer.weight.detach().norm(dim=1)
    optimizer = RotationalAdamW([layer.weight], lr=1e-2, weight_decay=0.5)
    for _ in range(4):
        run(optimizer, layer.weight, gradients((32, 64)))
    assert (layer.weight.norm(dim=1) / start - 1).abs().max() < 1e-5
    assert optimizer.state[layer.weight]["step"] == 200


@pytest.mark.parametrize("centering", ["none", "updates", "weights"])
def test_weights_wait_for_the_first_step_that_moves(centering: str) -> None:
    layer = nn.Linear(6, 4)
    start = layer.weight.detach().clone()
    optimizer = RotationalAdamW([layer.weight], centering=centering)
    assert torch.equal(layer.weight, start)
    assert not optimizer.state
    layer.weight.grad = torch.randn(4, 6)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(layer.weight, start)
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert not torch.equal(layer.weight, start)
    if centering == "weights":
        assert layer.weight.mean(dim=1).abs().max() < 1e-6


def test_match_takes_one_angle_for_the_whole_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 8))
    sizes = [float(layer.weight.detach().square().mean().sqrt()) for layer in model]
    optimizer = RotationalAdamW(plan(model).parameter_groups(), lr=1e-4, rotation="match", weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expected = 2 * (0.1 / 1.9) ** 0.5 * 1e-4 / sorted(sizes)[1]
    rotating = [group for group in optimizer.param_groups if group["rotational"]]
    assert [optimizer.target_rotation(group) for group in rotating] == pytest.approx([expected])
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 5e-5
    assert optimizer.target_rotation(rotating[0]) == pytest.approx(expected / 2)


def test_an_angle_in_radians_is_the_angle_of_every_step_without_smoothing() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).double()
    optimizer = RotationalAdamW([layer.weight], rotation=0.01, weight_decay=0.0, update_norm_decay=0.0)
    for grad in gradients((16, 32))[:5]:
        before = layer.weight.detach().clone()
        run(optimizer, layer.weight, [grad])
        cosine = nn.functional.cosine_similarity(before, layer.weight.detach(), dim=1)
        # A tangent step of 0.01 turns by atan(0.01).
        torch.testing.assert_close(
            torch.acos(cosine), torch.full((16,), 0.01, dtype=torch.float64).atan(), rtol=1e-6, atol=0.0
        )
