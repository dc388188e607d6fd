"""The parametrization against its formula, written out in float64 where nothing else is said."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_rotational.standardize import MODES
from hf_rotational.standardize.parametrization import EPS, ComputedWeight, Standardization
from tests.helpers import exactly_equal, noise

each_mode = pytest.mark.parametrize("mode", MODES)
each_layout = pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((5, 7), (0,)),
        ((7, 5), (1,)),
        ((6, 4, 3, 3), (0,)),
        ((4, 6, 3), (1,)),
        ((3, 5, 7), (0, 1)),
        ((3, 7, 5), (0, 2)),
        ((7, 3, 5), (1, 2)),
    ],
    ids=["rows", "columns", "convolution", "transposed", "experts", "experts-transposed", "heads"],
)


def rows(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Neurons by entries, built neuron by neuron."""
    sizes = [range(tensor.shape[dim]) for dim in dims]
    neurons = torch.cartesian_prod(*map(torch.tensor, sizes)).reshape(-1, len(dims)).tolist()
    return torch.stack([tensor.movedim(dims, tuple(range(len(dims))))[tuple(place)].flatten() for place in neurons])


def written_out(v: Tensor, gain: Tensor, mean: Tensor | None, grad: Tensor, mode: str) -> tuple[Tensor, ...]:
    """Weight, and the loss's gradients by V, gain and mean, given that by the weight; all as neurons by entries."""
    if mode == "gain":
        return gain[:, None] * v, gain[:, None] * grad, (grad * v).sum(1)
    centred = v - v.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + EPS).sqrt()
    unit = centred / scale
    weight = gain[:, None] * unit + (0 if mean is None else mean[:, None])
    inner = grad - grad.mean(1, keepdim=True) - unit * (grad * unit).mean(1, keepdim=True)
    by_v, by_gain = gain[:, None] / scale * inner, (grad * unit).sum(1)
    return (weight, by_v, by_gain) if mean is None else (weight, by_v, by_gain, grad.sum(1))


@each_mode
@each_layout
# What float32 leaves of sums over a few dozen entries.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_weight_and_gradients_are_those_of_the_formula(
    mode: str, shape: tuple[int, ...], dims: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    weight, grad = noise(*shape), noise(*shape, seed=1)
    module = Standardization(weight, dims, mode).to(dtype)
    with torch.no_grad():  # as after some steps: the parameters are no longer what V would give
        for seed, parameter in enumerate(module.parameters()):
            parameter.add_(noise(*parameter.shape, seed=seed, dtype=dtype))
    original = (1.5 * weight + 0.3).to(dtype).requires_grad_()
    computed = module(original)
    assert computed.dtype == dtype
    computed.backward(grad.to(dtype))
    parts = [part.double() for part in module.parameters()]
    mean = parts[1] if mode == "function_preserving" else None
    expected = written_out(rows(original.detach().double(), dims), parts[0], mean, rows(grad, dims), mode)
    found = [rows(computed, dims), rows(original.grad, dims), *(part.grad for part in module.parameters())]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.detach().double(), other, rtol=tolerance, atol=tolerance)


@each_layout
def test_it_is_torchs_layer_norm_of_each_neuron(shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    weight = noise(*shape)
    found = rows(Standardization(weight, dims, "drop_mean")(weight), dims).detach()
    neurons = rows(weight, dims)
    std = neurons.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(found, std * F.layer_norm(neurons, neurons.shape[1:], eps=EPS))


@each_mode
@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
def test_it_starts_as_the_weight_whatever_the_weights_size(mode: str, scale: float) -> None:
    weight = scale * (noise(5, 70, dtype=torch.float32) + 0.1)
    start = weight - weight.mean(1, keepdim=True) if mode == "drop_mean" else weight
    found = Standardization(weight, (0,), mode)(weight).detach()
    torch.testing.assert_close(found, start, rtol=0, atol=1e-6 * scale)


@each_mode
@pytest.mark.parametrize("dims", [(0,), (1,)])
def test_neurons_without_variance_are_their_mean_and_train_like_plain_ones(mode: str, dims: tuple[int, ...]) -> None:
    weight, grad = noise(6, 6), noise(6, 6, seed=1)
    weight.select(dims[0], 1).fill_(0.25)
    weight.select(dims[0], 2).zero_()
    module = Standardization(weight, dims, mode)
    original = weight.clone().requires_grad_()
    computed = module(original)
    computed.backward(grad)
    assert all(tensor.isfinite().all() for tensor in (computed, original.grad, *(p.grad for p in module.parameters())))
    for place, value in ((1, 0.25), (2, 0.0)):
        kept = 0.0 if mode == "drop_mean" else value
        torch.testing.assert_close(computed.select(dims[0], place), torch.full((6,), kept).double())
        plain = grad.select(dims[0], place)
        centred = plain if mode == "gain" else plain - plain.mean()
        torch.testing.assert_close(original.grad.select(dims[0], place), centred)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32_and_rounded(dtype: torch.dtype) -> None:
    weight = noise(5, 70, dtype=dtype)
    module = Standardization(weight, (0,), "function_preserving")
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    found = module(weight)
    assert found.dtype == dtype
    exact = Standardization(weight.double(), (0,), "function_preserving")
    for part, whole in zip(module.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(part, whole.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)
    # Gain, mean and weight are rounded once each.
    torch.testing.assert_close(found, weight, rtol=3 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@each_mode
def test_assigning_a_weight_takes_it_apart_anew(mode: str) -> None:
    linear = nn.Linear(7, 5, dtype=torch.float64)
    module = Standardization(linear.weight, (0,), mode)
    nn.utils.parametrize.register_parametrization(linear, "weight", module)
    new = noise(5, 7, seed=2)
    new -= new.mean(1, keepdim=True)
    linear.weight = new
    torch.testing.assert_close(linear.weight.detach().as_subclass(Tensor), new)
    exactly_equal(linear.parametrizations.weight.original.detach(), new)


def test_a_computed_weight_does_not_take_data_that_would_be_lost() -> None:
    weight = Standardization(noise(5, 7), (0,), "gain")(noise(5, 7))
    assert isinstance(weight, ComputedWeight)
    assert type(weight * 2) is Tensor
    assert type(weight.data) is not nn.Parameter
    with pytest.raises(RuntimeError, match=r"would be lost.*fold\(model\) first"):
        weight.data += 1
    with pytest.raises(RuntimeError, match=r"fold\(model\) first"):
        weight.data = noise(5, 7)
