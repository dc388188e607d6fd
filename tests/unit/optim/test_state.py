"""State: saved, loaded, moved between dtypes and devices, and taken over from torch's optimizers."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_rotational import RotationalAdam, RotationalAdamW, RotationalSGD, rotational
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.precision import ROUNDINGS
from tests.helpers import (
    LR,
    PLAIN,
    ROTATIONAL,
    WRITTEN_OUT,
    Builder,
    copies,
    each_optimizer,
    exactly_equal,
    gradient,
    make,
    noise,
    parameters,
    train,
    turned,
)

REPOSITORY = Path(__file__).parents[3]

SETTINGS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float64": (torch.float64, {}),
    "float32": (torch.float32, {"rotation": "match", "backend": "foreach"}),
    "centred": (torch.float32, {"centering": "weights", "transient_correction": True}),
    "nearest": (torch.bfloat16, {"rotation": 0.05}),
    "kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "gains": (torch.float32, {"gains": "learned", "centering": "learned"}),
    "kahan gains": (torch.bfloat16, {"gains": "learned", "rounding": "kahan"}),
    "stochastic": (torch.float16, {"rounding": "stochastic", "granularity": "tensor"}),
}

CASES = [
    (name, setting)
    for name, (setting, (_, options)) in itertools.product(ROTATIONAL, SETTINGS.items())
    if name in WRITTEN_OUT or "gains" not in options
]


def started(name: str, setting: str) -> tuple[RotationalOptimizer, list[nn.Parameter]]:
    dtype, options = SETTINGS[setting]
    params = parameters(dtype)
    return make(ROTATIONAL[name], params, **options), params


def resume(folder: Path) -> None:
    """Trains every checkpoint of the folder ten steps further; runs in another process."""
    for path in sorted(folder.glob("*.pt")):
        optimizer, params = started(*path.stem.split("-"))
        saved = torch.load(path, weights_only=True)
        for parameter, value in zip(params, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        train(optimizer, params, range(10, 20))
        save(optimizer, params, path)


def save(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], path: Path) -> None:
    torch.save({"optimizer": optimizer.state_dict(), "parameters": copies(params)}, path)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of all optimizers and settings after step 10, trained to step 20 in one other process."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    for name, setting in CASES:
        optimizer, params = started(name, setting)
        train(optimizer, params, range(10))
        save(optimizer, params, folder / f"{name}-{setting}.pt")
    program = f"from pathlib import Path; from {__name__} import resume; resume(Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
    return folder


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_resuming_in_another_process_is_bitwise(resumed: Path, name: str, setting: str) -> None:
    optimizer, params = started(name, setting)
    train(optimizer, params, range(20))
    saved = torch.load(resumed / f"{name}-{setting}.pt", weights_only=True)
    exactly_equal(saved["parameters"], copies(params))
    exactly_equal(saved["optimizer"]["state"], optimizer.state_dict()["state"])
    assert saved["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@each_optimizer
@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
def test_state_is_float32_whatever_the_parameters_become(
    before: torch.dtype, after: torch.dtype, build: Callable[..., RotationalOptimizer]
) -> None:
    params = parameters(before)
    optimizer = make(build, params)
    train(optimizer, params, range(3))
    moved = [nn.Parameter(parameter.detach().to(after)) for parameter in params]
    loaded = make(build, moved)
    loaded.load_state_dict(optimizer.state_dict())
    for parameter, other in zip(params, moved, strict=True):
        for key, value in optimizer.state[parameter].items():
            found = loaded.state[other][key]
            if isinstance(value, Tensor) and value.ndim > 0:
                assert found.dtype == (torch.float64 if after == torch.float64 else torch.float32)
                exactly_equal(found, value.to(found.dtype))
            else:
                exactly_equal(found, value)
    train(loaded, moved, range(3, 6))
    assert all(parameter.isfinite().all() for parameter in moved)


@each_optimizer
def test_a_model_cast_in_the_middle_of_a_run_keeps_its_state(build: Callable[..., RotationalOptimizer]) -> None:
    params = parameters(torch.float32)
    optimizer = make(build, params)
    train(optimizer, params, range(3))
    optimizer.zero_grad()
    for parameter in params:
        parameter.data = parameter.data.bfloat16()
    train(optimizer, params, range(3, 6))
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert {value.dtype for value in tensors} == {torch.float32}


@each_optimizer
def test_state_follows_its_parameter_to_another_device(build: Callable[..., RotationalOptimizer]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(build, params)
    train(optimizer, params, range(3))
    # Meta tensors have a device and a dtype as any, and every machine has them.
    elsewhere = [nn.Parameter(parameter.detach().to("meta")) for parameter in params]
    loaded = make(build, elsewhere)
    loaded.load_state_dict(optimizer.state_dict())
    for state in loaded.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert value.dtype == torch.float32
                assert value.device.type == ("cpu" if key == "step" else "meta")  # counters stay, as in torch


@each_optimizer
def test_optimizers_that_load_one_state_do_not_share_it(build: Callable[..., RotationalOptimizer]) -> None:
    params = parameters()
    optimizer = make(build, params)
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in params]
    loaded = make(build, twins)
    loaded.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    train(loaded, twins, range(3, 6))
    exactly_equal(saved["state"], before)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    params = parameters()
    optimizer = RotationalAdamW(params, weight_decay=0.1)
    train(optimizer, params, range(3))
    before = copy.deepcopy(optimizer.state_dict())
    two_groups = RotationalAdamW([{"params": params[:1]}, {"params": params[1:]}])
    no_angle = torch.optim.AdamW(parameters(), weight_decay=0.0)
    for other, message in (
        (two_groups, "different number of parameter groups"),
        (RotationalAdamW(params[:2]), "doesn't match the size"),
        (no_angle, "weight_decay=0 with rotation='equilibrium'"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())
        exactly_equal(optimizer.state_dict()["state"], before["state"])
        assert optimizer.state_dict()["param_groups"] == before["param_groups"]


def load(
    build: Builder, params: list[nn.Parameter], plain: torch.optim.Optimizer, **options: Any
) -> RotationalOptimizer:
    optimizer: RotationalOptimizer = make(build, params, **options)
    optimizer.load_state_dict(plain.state_dict())
    return optimizer


def take_over(
    build: Builder, params: list[nn.Parameter], plain: torch.optim.Optimizer, **options: Any
) -> RotationalOptimizer:
    optimizer: RotationalOptimizer = make(build, [{"params": params[2:]}, {"params": params[:2]}], **options)
    optimizer.take_over(plain)
    return optimizer


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("continued", [load, take_over])
@pytest.mark.parametrize("transient_correction", [False, True])
def test_switching_from_torch_in_the_middle_of_a_run(
    transient_correction: bool, continued: Callable[..., RotationalOptimizer], name: str
) -> None:
    angle = 0.05
    params = parameters()
    plain = make(PLAIN[name], params, weight_decay=0.0)
    train(plain, params, range(10))
    onward, twins = copy.deepcopy((plain, params))
    before, start = copy.deepcopy(plain.state_dict()["state"]), params[0].detach().clone()
    options = {"rotation": angle, "weight_decay": 0.0, "transient_correction": transient_correction}
    optimizer = continued(ROTATIONAL[name], params, plain, **options)
    train(optimizer, params, [10])
    train(onward, twins, [10])

    exactly_equal(plain.state_dict()["state"], before)  # nothing is shared
    torch.testing.assert_close(params[2], twins[2], rtol=1e-12, atol=1e-12)
    # Torch's next step without its radial part, at the target angle: a tangent step, so its arc tangent. 1e-8:
    # rotational_eps against updates of size 1.
    step = start - twins[0].detach()
    norm = start.norm(dim=1, keepdim=True)
    step -= start * (step * start).sum(dim=1, keepdim=True) / norm**2
    direction = nn.functional.normalize(start / norm - angle * nn.functional.normalize(step))
    torch.testing.assert_close(params[0].detach(), norm * direction, rtol=0, atol=1e-8)
    target = torch.full((5,), angle, dtype=torch.float64).atan()
    torch.testing.assert_close(turned(start, params[0]), target, rtol=0, atol=1e-8)


def test_momentum_taken_over_is_not_taken_for_a_first_gradient() -> None:
    params = parameters()
    plain = make(torch.optim.SGD, params, momentum=0.9, dampening=0.5)  # torch does not dampen the first gradient
    train(plain, params, range(3))
    onward, twins = copy.deepcopy((plain, params))
    optimizer = make(RotationalSGD, params, momentum=0.9, dampening=0.5)
    optimizer.take_over(plain)
    train(optimizer, params, [3])
    train(onward, twins, [3])
    torch.testing.assert_close(params[2], twins[2], rtol=1e-12, atol=1e-12)


def test_float32_moments_of_16_bit_parameters_come_from_16_bit_ones() -> None:
    params = parameters(torch.bfloat16)
    plain = torch.optim.AdamW(params)
    train(plain, params, range(3))
    optimizer = RotationalAdamW(params)
    optimizer.take_over(plain)
    for parameter in params:
        for key in ("exp_avg", "exp_avg_sq"):
            exactly_equal(optimizer.state[parameter][key], plain.state[parameter][key].float())
    train(optimizer, params, range(3, 6))


def test_what_was_never_stepped_starts_afresh_after_a_take_over() -> None:
    params, twins = parameters(), parameters()
    plain = torch.optim.AdamW(params)
    train(plain, params[:1], range(3))
    optimizer, fresh = make(RotationalAdamW, params), make(RotationalAdamW, twins)
    optimizer.take_over(plain)
    for place in (1, 2):
        params[place].grad, twins[place].grad = (gradient(params[place], place, 0) for _ in range(2))
    optimizer.step()
    fresh.step()
    exactly_equal(params[1:], twins[1:])


@pytest.mark.parametrize(("ours", "plain"), [(RotationalAdamW, torch.optim.AdamW), (RotationalAdam, torch.optim.Adam)])
def test_amsgrad_is_refused_with_a_way_out(ours: type[RotationalOptimizer], plain: type[torch.optim.Optimizer]) -> None:
    params = parameters()
    running = make(plain, params, amsgrad=True)
    train(running, params, range(3))
    optimizer = make(ours, params)
    for hand_over in (lambda: optimizer.load_state_dict(running.state_dict()), lambda: optimizer.take_over(running)):
        with pytest.raises(ValueError, match=r"Invalid amsgrad: True .*rotational\(torch\.optim\.AdamW\)"):
            hand_over()
        assert not optimizer.state
    continued = rotational(running)
    maxima = copies(state["max_exp_avg_sq"] for state in continued.state.values())
    train(continued, params, range(3, 6))
    for state, before in zip(continued.state.values(), maxima, strict=True):
        assert (state["max_exp_avg_sq"] >= before).all()
        assert state["step"] == 6


def test_state_of_strangers_is_refused() -> None:
    params = [nn.Parameter(noise(5, 7)), nn.Parameter(noise(2, 3))]
    plain = make(PLAIN["momentum"], params)
    train(plain, params, [0])
    with pytest.raises(ValueError, match=r"SGD has state of parameters not here, of shapes \[\(2, 3\)\]"):
        RotationalSGD(params[:1], momentum=0.9).take_over(plain)


def test_state_of_another_kind_of_optimizer_is_refused_and_changes_nothing() -> None:
    params = parameters()
    plain = torch.optim.SGD(params, lr=LR, momentum=0.9)
    train(plain, params, range(2))
    optimizer = RotationalAdamW(params, lr=LR)
    for load in (lambda: optimizer.load_state_dict(plain.state_dict()), lambda: optimizer.take_over(plain)):
        with pytest.raises(ValueError, match="it has momentum_buffer but no exp_avg, exp_avg_sq"):
            load()
    assert not optimizer.state


def test_the_users_hooks_see_and_change_what_is_loaded() -> None:
    params = parameters()
    optimizer = RotationalAdamW(params, lr=LR)
    train(optimizer, params, range(2))

    def halve(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        state = {place: {**entry, "exp_avg": entry["exp_avg"] / 2} for place, entry in given["state"].items()}
        return {**given, "state": state}

    def note(loaded: torch.optim.Optimizer) -> None:
        seen.append(loaded.state[params[0]]["exp_avg"].clone())

    seen: list[Tensor] = []
    other = RotationalAdamW(params, lr=LR)
    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(note)
    other.load_state_dict(optimizer.state_dict())
    exactly_equal(other.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg"] / 2)
    exactly_equal(seen, [other.state[params[0]]["exp_avg"]])


def test_the_first_steps_are_not_corrected_twice_after_a_take_over() -> None:
    matrix = nn.Parameter(noise(256, 64))
    plain = torch.optim.AdamW([matrix], lr=LR)
    train(plain, [matrix], range(50))
    optimizer = RotationalAdamW([matrix], lr=LR, rotation=1e-3, weight_decay=0.0, transient_correction=True)
    optimizer.take_over(plain)
    ratios = []
    for step in range(50, 70):
        before = matrix.detach().clone()
        train(optimizer, [matrix], [step])
        ratios.append(turned(before, matrix).mean().item() / 1e-3)
    # Moments of 50 gradients give updates of their late size; 256 neurons average the noise to about 1 %.
    assert max(ratios) < 1.03
    assert min(ratios) > 0.97


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_distributed_checkpoint_has_all_that_rounding_keeps(rounding: str, name: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, Any]:
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        for place, parameter in enumerate(model.parameters()):
            parameter.data = noise(*parameter.shape, seed=place, dtype=torch.bfloat16)
        return model, make(ROTATIONAL[name], model.parameters(), rounding=rounding, rotation=1e-3)

    def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    (model, optimizer), (resumed, loaded) = build(), build()
    train(optimizer, list(model.parameters()), range(5))
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path, no_dist=True)
    state = state_of(resumed, loaded)  # takes a step at lr 0, and loads what there is then
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(resumed, state["model"])
    set_optimizer_state_dict(resumed, loaded, state["optimizer"])
    for each, stepped in ((model, optimizer), (resumed, loaded)):
        train(stepped, list(each.parameters()), range(5, 10))
    exactly_equal(copies(resumed.parameters()), copies(model.parameters()))
