"""What a user gets wrong is refused with the argument and the value named, and leaves nothing half done."""

import re

import pytest
import torch
from torch import nn

from hf_rotational import RotationalAdamW, RotationalOptimizerFactory
from hf_rotational.optim.sharding import PIECES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "Invalid lr: -1.0"),
        ({"lr": float("nan")}, "Invalid lr: nan"),
        ({"weight_decay": -0.1}, "Invalid weight_decay: -0.1"),
        ({"betas": (0.9, 1.0)}, "Invalid betas[1]: 1.0"),
        ({"betas": (-0.1, 0.9)}, "Invalid betas[0]: -0.1"),
        ({"eps": -1e-8}, "Invalid eps: -1e-08"),
        ({"rotation": "fast"}, "Invalid rotation: 'fast' (must be one of equilibrium, match, or a number > 0"),
        ({"rotation": 0.0}, "Invalid rotation: 0.0"),
        ({"rotation": 0.1, "lr": 0.0}, "must not be 0: lr=0"),
        ({"centering": "mean"}, "Invalid centering: 'mean' (must be one of none, updates, weights, learned)"),
        ({"gains": "free"}, "Invalid gains: 'free' (must be one of fixed, learned)"),
        ({"gain_lr_multiplier": -1.0}, "Invalid gain_lr_multiplier: -1.0"),
        ({"gain_weight_decay": float("inf")}, "Invalid gain_weight_decay: inf"),
        ({"granularity": "row"}, "Invalid granularity: 'row'"),
        ({"update_norm_decay": 1.0}, "Invalid update_norm_decay: 1.0"),
        ({"rotational_eps": -1.0}, "Invalid rotational_eps: -1.0"),
        ({"backend": "fast"}, "Invalid backend: 'fast' (must be one of auto, fused, eager, foreach)"),
        ({"capturable": True, "transient_correction": True}, "Invalid capturable: True with transient_correction=True"),
        (
            {"capturable": True, "lr": torch.tensor(1.0).double()},
            "Invalid lr: a tensor of torch.float64 (must be float32",
        ),
    ],
)
def test_hyperparameters_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RotationalAdamW([nn.Parameter(torch.ones(3, 4))], **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neuron_dims": 1}, "Invalid neuron_dims: 1 for the parameter of shape (3, 4) (must be some of its dims)"),
        ({"backend": "fast"}, "Invalid backend: 'fast'"),
    ],
)
def test_settings_of_a_group_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RotationalAdamW([{"params": [nn.Parameter(torch.ones(3, 4))], **settings}])


def test_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="rotational_epsilon"):
        RotationalAdamW([nn.Parameter(torch.ones(3, 4))], rotational_epsilon=1e-8)  # type: ignore[call-arg]


def test_weight_decay_0_names_the_ways_out() -> None:
    with pytest.raises(ValueError, match="angle 0") as error:
        RotationalAdamW([nn.Parameter(torch.ones(3, 4))], weight_decay=0.0)
    for way_out in ("Set weight_decay", "rotation='match'", "rotation=<radians per step>", "rotational=False"):
        assert way_out in str(error.value)


def test_weight_decay_0_is_fine_where_nothing_rotates() -> None:
    bias, table = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3, 4))
    RotationalAdamW([{"params": [bias]}, {"params": [table], "rotational": False}], weight_decay=0.0)


def test_neuron_dims_out_of_range() -> None:
    with pytest.raises(ValueError, match=re.escape("Invalid neuron_dims: (2,) for the parameter of shape (3, 4)")):
        RotationalAdamW([{"params": [nn.Parameter(torch.ones(3, 4))], "neuron_dims": (2,)}])


def test_complex_parameter() -> None:
    with pytest.raises(ValueError, match="complex64"):
        RotationalAdamW([nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))])


def test_sparse_gradient() -> None:
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=re.escape("sparse gradients, and the parameter of shape (5, 4)")):
        RotationalAdamW(table.parameters()).step()


def test_refused_group_is_not_added() -> None:
    optimizer = RotationalAdamW([nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ValueError, match="Invalid lr: -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 4))], "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("shape", [(12,), (3, 2), (0,)], ids=["flattened", "cut up", "emptied"])
def test_matrices_taken_apart_behind_its_back(shape: tuple[int, ...]) -> None:
    matrix, bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
    optimizer = RotationalAdamW([{"params": [matrix]}, {"params": [bias]}])
    # DeepSpeed puts other tensors in the place of a group's parameters, or other contents into them.
    matrix.data = torch.ones(shape)
    matrix.grad = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"the first of shape \(3, 4\), have lost .*FSDP version 2"):
        optimizer.step()
    assert torch.equal(matrix, torch.ones(shape))


@pytest.mark.parametrize("mark", PIECES)
def test_parts_of_unknown_tensors(mark: str) -> None:
    model = nn.Linear(3, 4)
    setattr(model.weight, mark, torch.Size([8, 3]) if mark == "ds_shape" else True)
    message = re.escape(f"of shape (4, 3): {PIECES[mark]}") + ".*FSDP version 2"
    with pytest.raises(ValueError, match=message):
        RotationalAdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        RotationalOptimizerFactory()(model, lr=1e-3)
