"""The rotational variant of any torch optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_rotational import RotationalAdamW, RotationalSGD, rotational
from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.helpers import LR, TOLERANCE, gradients, noise, train_on

SGD = {"momentum": 0.9, "nesterov": True}
ANY = ["NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "Adafactor", "ASGD", "Rprop", "Muon"]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(noise(*shape).to(dtype)) for shape in ((5, 7), (5,))]


def run(optimizer: torch.optim.Optimizer, steps: int = 20, start: int = 0) -> list[Tensor]:
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    train_on(optimizer, {p: gradients(tuple(p.shape))[start:] for p in members}, [LR] * steps)
    return [parameter.detach() for parameter in members]


@pytest.mark.parametrize("options", [{}, {"centering": "weights", "update_norm_decay": 0.0}, {"backend": "foreach"}])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("plain", "ours", "arguments"), [(torch.optim.AdamW, RotationalAdamW, {}), (torch.optim.SGD, RotationalSGD, SGD)]
)
def test_equals_the_optimizer_that_is_written_out(
    plain: type[torch.optim.Optimizer],
    ours: Any,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    settings = {"lr": LR, "weight_decay": 0.1, **arguments}
    results = [
        run(rotational(plain)(parameters(dtype), **settings, **options), 100),
        run(rotational(plain(parameters(dtype), **settings), **options), 100),
        run(ours(parameters(dtype), **settings, **options), 100),
    ]
    for from_class, from_instance, written in zip(*results, strict=True):
        torch.testing.assert_close(from_class, written, rtol=0, atol=TOLERANCE[dtype])
        assert torch.equal(from_class, from_instance)


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_optimizer_turns_by_the_angle_at_constant_norm(name: str, dtype: torch.dtype) -> None:
    matrix = parameters(dtype)[0]
    start = matrix.detach().double()
    optimizer = rotational(getattr(torch.optim, name))([matrix], lr=LR, rotation=0.05, update_norm_decay=0.0)
    (turned,) = run(optimizer, 1)
    cosine = nn.functional.cosine_similarity(start, turned.double(), dim=1)
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(cosine, torch.full_like(cosine, 0.05).atan().cos(), rtol=precision, atol=0.0)
    (moved,) = run(optimizer, 10)
    torch.testing.assert_close(moved.double().norm(dim=1), start.norm(dim=1), rtol=2 * precision, atol=0.0)
    assert not [k for k, v in optimizer.state[matrix].items() if isinstance(v, Tensor) and v.dtype == torch.bfloat16]


def test_an_instance_is_continued() -> None:
    settings = {"lr": LR, "weight_decay": 0.1}
    plain = torch.optim.AdamW(parameters(), **settings)
    run(plain, 10)
    moments = [state["exp_avg_sq"].clone() for state in plain.state.values()]
    optimizer = rotational(plain)
    assert type(optimizer).__name__ == "RotationalAdamW"
    for state, before in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg_sq"], before)
        assert state["step"] == 10
    run(optimizer, 1, start=10)
    assert all(state["step"] == 11 for state in optimizer.state.values())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_and_checkpoints_continue_alike(copied: Any) -> None:
    def fresh() -> RotationalOptimizer:
        return rotational(torch.optim.NAdam)(parameters(), lr=LR, weight_decay=0.1)

    optimizer = fresh()
    run(optimizer, 10)
    twin = copied(optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    loaded = fresh()
    for mine, theirs in zip(loaded.rotating(), optimizer.rotating(), strict=True):
        mine[0].data.copy_(theirs[0])
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    expected = run(optimizer, 10, start=10)
    for other in (twin, loaded):
        assert torch.equal(run(other, 10, start=10)[0], expected[0])


def test_what_cannot_be_wrapped_says_so() -> None:
    with pytest.raises(ValueError, match=r"Invalid optimizer: LBFGS \(must be a torch optimizer, not rotational"):
        rotational(torch.optim.LBFGS)
    with pytest.raises(ValueError, match="Invalid optimizer: RotationalAdamW"):
        rotational(RotationalAdamW)
    with pytest.raises(ValueError, match="no closed form for RMSprop: set rotation='match'"):
        rotational(torch.optim.RMSprop)(parameters(), lr=LR, weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay=0 with rotation='equilibrium'"):
        rotational(torch.optim.NAdam)(parameters(), lr=LR)
    with pytest.raises(TypeError, match="momentun"):
        rotational(torch.optim.SGD)(parameters(), lr=LR, momentun=0.9)  # type: ignore[call-arg]
