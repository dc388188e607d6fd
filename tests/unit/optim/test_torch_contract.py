"""What torch's own optimizers do around a step, the rotational ones do too; torch's AdamW and SGD are the control."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from hf_rotational.optim.optimizer import RotationalOptimizer
from tests.helpers import (
    LR,
    PLAIN,
    ROTATIONAL,
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

CONTROLS = {f"torch.{name}": PLAIN[name] for name in ("AdamW", "momentum")}
each_and_torch = pytest.mark.parametrize(
    "build", [*ROTATIONAL.values(), *CONTROLS.values()], ids=[*ROTATIONAL, *CONTROLS]
)


def state_of(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    return copy.deepcopy(optimizer.state_dict()["state"])


@each_and_torch
def test_closure(build: Builder) -> None:
    results = []
    for by_hand in (False, True):
        params = parameters()
        optimizer = make(build, params)

        def closure(params: list[nn.Parameter] = params) -> Tensor:
            for parameter in params:
                parameter.grad = None
            loss = torch.stack([(each - gradient(each, 0, 0)).square().sum() for each in params]).sum()
            loss.backward()  # fails unless gradients are enabled
            return loss

        losses = []
        for _ in range(3):
            losses.append(closure() if by_hand else optimizer.step(closure))
            if by_hand:
                assert optimizer.step() is None
        results.append(([loss.detach() for loss in losses], copies(params)))
    exactly_equal(*results)


@each_and_torch
def test_maximize_is_minimizing_the_negative(build: Builder) -> None:
    uphill, downhill = parameters(), parameters()
    train(make(build, uphill, maximize=True), uphill, range(3))
    train(make(build, downhill), downhill, range(3), factor=-1.0)
    exactly_equal(uphill, downhill)


@each_and_torch
def test_learning_rate_as_a_tensor(build: Builder) -> None:
    params, twins = parameters(), parameters()
    lr = torch.tensor(LR, dtype=torch.float64)
    optimizer = make(build, params, lr=lr)
    twin = make(build, twins)
    train(optimizer, params, range(3))
    train(twin, twins, range(3))
    lr.mul_(0.5)
    twin.param_groups[0]["lr"] *= 0.5
    train(optimizer, params, range(3, 6))
    train(twin, twins, range(3, 6))
    # torch itself computes 1 - lr wd with a tensor in another order than with a number.
    torch.testing.assert_close(params, twins, rtol=1e-12, atol=1e-15)


def decays(step: int) -> float:
    return 1 / (1 + step)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, decays),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    # The equilibrium angle would follow a cycle of momentum as well.
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 3 * LR, total_steps=7, cycle_momentum=False),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


@each_optimizer
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize(("rotation", "power"), [("equilibrium", 0.5), ("match", 1.0), (0.05, 1.0)], ids=str)
def test_angle_follows_schedulers(
    build: Callable[..., RotationalOptimizer], schedule: Callable[..., Any], rotation: str | float, power: float
) -> None:
    matrix, other = nn.Parameter(noise(5, 7)), nn.Parameter(noise(5, 7))
    # Without smoothing each step turns by the target angle.
    optimizer = make(build, [matrix], rotation=rotation, update_norm_decay=0.0)
    control = torch.optim.SGD([other], lr=LR)
    (group,) = optimizer.param_groups
    at_constructors_lr = optimizer.target_rotation(group)
    assert rotation in ("equilibrium", "match", at_constructors_lr)
    ours, torchs = schedule(optimizer), schedule(control)
    for step in range(6):
        assert group["lr"] == control.param_groups[0]["lr"]
        target = at_constructors_lr * (group["lr"] / LR) ** power
        assert math.isclose(optimizer.target_rotation(group), target, rel_tol=1e-12)
        (before,) = copies([matrix])
        train(optimizer, [matrix], [step])
        train(control, [other], [step])
        # A tangent step of the target angle turns by its arc tangent; 1e-9: rotational_eps against updates of size 1.
        torch.testing.assert_close(
            turned(before, matrix), torch.full((5,), target).double().atan(), rtol=1e-6, atol=1e-9
        )
        for scheduler in (ours, torchs):
            metric = [1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []
            scheduler.step(*metric)


@each_and_torch
def test_one_cycle_of_momentum(build: Builder) -> None:
    params, other = parameters(), parameters()
    optimizer, control = make(build, params), make(PLAIN["momentum"], other)
    schedulers = [lr_scheduler.OneCycleLR(each, 3 * LR, total_steps=7) for each in (optimizer, control)]
    (group,), (expected,) = optimizer.param_groups, control.param_groups
    for step in range(6):
        assert (group["betas"][0] if "betas" in group else group["momentum"]) == expected["momentum"]
        train(optimizer, params, [step])
        train(control, other, [step])
        for scheduler in schedulers:
            scheduler.step()
    assert all(parameter.isfinite().all() for parameter in params)


@each_and_torch
def test_gradient_clipping(build: Builder) -> None:
    clipped, twins = parameters(), parameters()
    optimizer, twin = make(build, clipped), make(build, twins)
    for step in range(3):
        gradients = [gradient(parameter, place, step) for place, parameter in enumerate(clipped)]
        norm = math.sqrt(sum(float(each.square().sum()) for each in gradients))
        for parameter, each in zip(clipped, gradients, strict=True):
            parameter.grad = each
        nn.utils.clip_grad_norm_(clipped, 0.1)
        optimizer.step()
        train(twin, twins, [step], factor=0.1 / norm)
    # clip_grad_norm_ adds 1e-6 to the norm, which is about 8.
    torch.testing.assert_close(clipped, twins, rtol=1e-6, atol=1e-6)


@each_and_torch
def test_skipped_steps_of_a_grad_scaler_leave_everything_untouched(build: Builder) -> None:
    scaled, twins = parameters(torch.float32), parameters(torch.float32)
    optimizer, twin = make(build, scaled), make(build, twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # makes the scale, as the first loss would
    overflows = {0, 3}
    for step in range(6):
        before = state_of(optimizer), copies(scaled)
        for place, parameter in enumerate(scaled):
            parameter.grad = gradient(parameter, place, step) * scaler.get_scale()
        if step in overflows:
            scaled[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if step in overflows:
            exactly_equal((state_of(optimizer), copies(scaled)), before)
        else:
            train(twin, twins, [step])
    assert scaler.get_scale() == 256.0
    # Scales are powers of two, so nothing is rounded.
    exactly_equal((state_of(optimizer), scaled), (state_of(twin), twins))


@each_and_torch
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_go_their_own_way_alike(build: Builder, copied: Callable[..., Any]) -> None:
    params = parameters()
    optimizer = make(build, params)
    train(optimizer, params, range(3))
    twin, twins = copied((optimizer, params))
    assert type(twin) is type(optimizer)
    before = state_of(twin), copies(twins)
    train(optimizer, params, range(3, 6))
    exactly_equal((state_of(twin), copies(twins)), before)
    train(twin, twins, range(3, 6))
    exactly_equal((state_of(twin), twins), (state_of(optimizer), params))


@each_and_torch
def test_step_hooks_see_the_weights_before_and_after(build: Builder) -> None:
    params = parameters()
    optimizer = make(build, params)
    seen: list[tuple[torch.optim.Optimizer, list[Tensor]]] = []

    def look(caller: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        seen.append((caller, copies(params)))

    handles = [optimizer.register_step_pre_hook(look), optimizer.register_step_post_hook(look)]
    start = copies(params)
    train(optimizer, params, [0])
    assert [caller for caller, _ in seen] == [optimizer, optimizer]
    exactly_equal([values for _, values in seen], [start, copies(params)])
    for handle in handles:
        handle.remove()
    train(optimizer, params, [1])
    assert len(seen) == 2


@each_and_torch
def test_zero_grad(build: Builder) -> None:
    params, twins = parameters(), parameters()
    optimizer, twin = make(build, params), make(build, twins)
    train(optimizer, params, range(3))
    train(twin, twins, range(3))

    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in params)
    before = state_of(optimizer), copies(params)
    optimizer.step()
    exactly_equal((state_of(optimizer), copies(params)), before)

    train(optimizer, params, [3])
    train(twin, twins, [3])
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # a gradient of zeros is a gradient: moments decay, and momentum moves
    for parameter in twins:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()
    exactly_equal((state_of(optimizer), params), (state_of(twin), twins))


@each_and_torch
def test_named_parameters(build: Builder) -> None:
    named, twins = parameters(), parameters()
    names = ["matrix", "stack", "vector"]
    optimizer, twin = make(build, zip(names, named, strict=True)), make(build, twins)
    train(optimizer, named, range(3))
    train(twin, twins, range(3))
    exactly_equal(named, twins)

    assert optimizer.param_groups[0]["param_names"] == names
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == names
    # Names are for people: the state is matched by place, with or without them.
    twin.load_state_dict(saved)
    optimizer.load_state_dict(twin.state_dict())
    exactly_equal(state_of(optimizer), saved["state"])
    assert optimizer.param_groups[0]["param_names"] == names

    late = nn.Parameter(noise(2, 3))
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [late]})
    optimizer.add_param_group({"params": [("late", late)]})
    assert optimizer.param_groups[1]["param_names"] == ["late"]
