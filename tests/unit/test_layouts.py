"""The table of layouts where it needs care: what it must not believe."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from hf_rotational import plan
from hf_rotational.layouts import UNKNOWN, layout


def outcome(model: nn.Module, name: str, **options: object) -> tuple[tuple[int, ...], str]:
    (entry,) = (entry for entry in plan(model, **options) if entry.name == name)  # type: ignore[arg-type]
    return entry.neuron_dims, entry.reason


@pytest.mark.parametrize(
    ("module", "name", "dims"),
    [
        (nn.Linear(4, 5), "weight", (0,)),
        (nn.Conv2d(4, 6, 3, groups=2), "weight", (0,)),
        (nn.ConvTranspose1d(4, 6, 3), "weight", (1,)),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (0,)),
        (nn.MultiheadAttention(4, 2, kdim=3), "q_proj_weight", (0,)),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", ()),
        (nn.Bilinear(3, 4, 5), "weight", ()),
        (nn.LayerNorm((3, 4)), "weight", ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_torch_modules(module: nn.Module, name: str, dims: tuple[int, ...]) -> None:
    assert layout(module, name).neuron_dims == dims


def test_a_grouped_transposed_convolution_has_no_dims_for_its_neurons() -> None:
    assert outcome(nn.ConvTranspose2d(4, 6, 3, groups=2), "weight") == (
        (),
        "grouped transposed convolution: no dims index its neurons",
    )


def test_recurrent_and_parametrized_weights_are_left_with_a_reason() -> None:
    assert outcome(nn.LSTM(4, 5), "weight_ih_l0")[1].startswith("recurrent layer")
    normed = weight_norm(nn.Conv1d(4, 6, 3))
    assert outcome(normed, "parametrizations.weight.original1") == ((), "parametrized by the model")


class Transposing(nn.Linear):
    """Square, so that its shape does not tell that its neurons are columns."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


def test_a_subclass_with_a_forward_of_its_own_rotates_only_if_asked() -> None:
    model = nn.Sequential(Transposing(4, 4))
    assert outcome(model, "0.weight") == ((), "its class has a forward of its own")
    assert outcome(model, "0.weight", include=["weight"]) == ((0,), "included")


def test_a_subclass_without_one_rotates() -> None:
    class Initialized(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.orthogonal_(self.weight)

    assert outcome(Initialized(4, 5), "weight") == ((0,), "weight matrix")


def test_names_count_in_transformers_only() -> None:
    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))

    assert layout(TopKRouter(), "weight").reason == UNKNOWN


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_quantized_weights_never_rotate(dtype: torch.dtype) -> None:
    linear = nn.Linear(4, 5)
    linear.weight = nn.Parameter(torch.ones(5, 4).to(dtype), requires_grad=False)
    dims, reason = outcome(linear, "weight", include=["weight"])
    assert dims == ()
    assert reason.startswith("quantized or not real")


def test_packed_weights_never_rotate() -> None:
    linear = nn.Linear(4, 5)
    linear.weight = nn.Parameter(torch.ones(20))
    assert outcome(linear, "weight") == ((), "1 dims")


def test_a_weight_without_a_shape_yet_is_listed() -> None:
    assert outcome(nn.LazyLinear(5), "weight") == ((), "not initialized yet")


def test_a_tie_between_layouts_that_disagree_is_left() -> None:
    model = nn.ModuleDict({"rows": nn.Linear(4, 4), "columns": nn.ConvTranspose1d(4, 4, 3)})
    model["rows"].weight = model["columns"].weight
    assert outcome(model, "rows.weight") == ((), UNKNOWN)
