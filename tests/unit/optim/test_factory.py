"""From a model and training arguments to the optimizer."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_rotational import RotationalConfig, RotationalOptimizerFactory, equilibrium, plan
from hf_rotational.optim.config import parse_optim_args
from hf_rotational.optim.factory import factory_kwargs


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5))


@pytest.fixture
def info_lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    transformers_logging.enable_propagation()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    caplog.set_level(logging.INFO)
    yield caplog
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.disable_propagation()


def angle(optimizer: torch.optim.Optimizer) -> float:
    (angle,) = {optimizer.target_rotation(group) for group in optimizer.param_groups if group["rotational"]}  # type: ignore[attr-defined]
    return float(angle)


@pytest.mark.parametrize(
    ("optim", "form", "weight_decay"),
    [("adamw", "adamw", 0.1), ("adam", "adamw", 0.1), ("sgd", "sgdm", 1e-4), ("lion", "lion", 0.5)],
)
def test_weight_decay_0_means_the_default_for_the_angle_and_says_so_once(
    optim: str, form: str, weight_decay: float, model: nn.Module, info_lines: pytest.LogCaptureFixture
) -> None:
    optimizer = RotationalOptimizerFactory()(model, optim=f"rotational_{optim}", lr=5e-5)
    own = {"fan_in": 1} if form == "lion" else {}
    assert angle(optimizer) == getattr(equilibrium, form)(lr=5e-5, weight_decay=weight_decay, **own).rotation
    assert [group["weight_decay"] for group in optimizer.param_groups if not group["rotational"]] == [0.0]
    assert (
        len([line for line in info_lines.messages if f"weight decay {weight_decay} (angle_weight_decay)" in line]) == 1
    )


def test_the_users_weight_decay_sets_the_angle_and_decays_the_rest(
    model: nn.Module, info_lines: pytest.LogCaptureFixture
) -> None:
    optimizer = RotationalOptimizerFactory()(model, lr=5e-5, weight_decay=0.2)
    assert angle(optimizer) == equilibrium.adamw(lr=5e-5, weight_decay=0.2).rotation
    decays = {group["weight_decay"] for group in optimizer.param_groups if not group["rotational"]}
    assert decays == {0.2, 0.0}
    assert not [line for line in info_lines.messages if "angle_weight_decay" in line]


def test_a_weight_decay_of_the_angles_own_wins(model: nn.Module) -> None:
    optimizer = RotationalOptimizerFactory()(model, lr=5e-5, weight_decay=0.01, angle_weight_decay=0.2)
    assert angle(optimizer) == equilibrium.adamw(lr=5e-5, weight_decay=0.2).rotation
    assert {group["weight_decay"] for group in optimizer.param_groups if not group["rotational"]} == {0.01, 0.0}


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({"weight_decay": 0.01}, True),  # what tutorials set
        ({"weight_decay": 0.0}, False),
        ({"weight_decay": 0.05}, False),
        ({"weight_decay": 0.01, "lr": 1e-2}, False),  # the angle is large enough
        ({"weight_decay": 0.01, "rotation": "match"}, False),
        ({"weight_decay": 0.01, "angle_weight_decay": 0.1}, False),
    ],
)
def test_an_angle_that_is_small_for_fine_tuning_is_told(
    settings: dict[str, Any], warned: bool, model: nn.Module, info_lines: pytest.LogCaptureFixture
) -> None:
    RotationalOptimizerFactory()(model, **{"lr": 5e-5, **settings})
    told = [line for line in info_lines.messages if "weight_decay=0.01 makes the target angle 0.00023 rad" in line]
    assert len(told) == warned


def test_what_is_frozen_is_not_counted(model: nn.Module, info_lines: pytest.LogCaptureFixture) -> None:
    for parameter in plan(model).rotating:
        parameter.parameter.requires_grad_(False)
    RotationalOptimizerFactory()(model, lr=5e-5)
    (line,) = [line for line in info_lines.messages if line.startswith("RotationalAdamW")]
    assert line.startswith("RotationalAdamW: of those that train, 0 of ")
    assert line.endswith("every step is the plain optimizer's.")


def test_undecayed_parameters_are_the_trainers(model: nn.Module) -> None:
    optimizer = RotationalOptimizerFactory()(model, lr=5e-5, weight_decay=0.2)
    undecayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    expected = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert undecayed == {id(p) for name, p in model.named_parameters() if name not in expected}
    assert undecayed


def test_settings_reach_plan_and_optimizer(model: nn.Module) -> None:
    optimizer = RotationalOptimizerFactory()(
        model, lr=1e-4, betas=(0.8, 0.9), rotation=0.01, centering="updates", embeddings=True
    )
    (rotating,) = [group for group in optimizer.param_groups if group["rotational"]]
    assert [tuple(parameter.shape) for parameter in rotating["params"]] == [(7, 6), (5, 6)]
    assert (rotating["betas"], rotating["rotation"], rotating["centering"]) == ((0.8, 0.9), 0.01, "updates")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw"}, "Unknown optim: 'adamw' .*rotational_adamw"),
        ({"rotations": 1.0}, "Unknown setting: 'rotations' .*rotation, .*centering.*betas"),
        ({"rotation": "fast"}, "Invalid rotation: 'fast'"),
        ({"angle_weight_decay": -1.0}, "Invalid angle_weight_decay: -1.0"),
        ({"exclude": "."}, "No parameter of Sequential rotates"),
    ],
)
def test_bad_settings(model: nn.Module, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotationalOptimizerFactory()(model, lr=1e-4, **settings)  # type: ignore[arg-type]


def test_optim_args_are_read_and_checked(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), optim_args="rotation=match, centering=updates,embeddings=true")
    args.optim = "rotational_adamw"
    kwargs = factory_kwargs(args)
    assert (kwargs["rotation"], kwargs["centering"], kwargs["embeddings"]) == ("match", "updates", True)
    args.optim_args = "rotation=0.02,angle_weight_decay=5e-2"
    assert factory_kwargs(args)["rotation"] == 0.02
    assert factory_kwargs(args)["angle_weight_decay"] == 0.05
    args.optim_args = "rotatoin=match"
    with pytest.raises(ValueError, match=r"Unknown optim_args key: 'rotatoin' .*rotation, .*exclude"):
        factory_kwargs(args)
    args.optim, args.optim_args = "rotational_sgd", "momentum=0.9,nesterov=true"
    kwargs = factory_kwargs(args)
    assert (kwargs["momentum"], kwargs["nesterov"]) == (0.9, True)
    assert "betas" not in kwargs
    args.optim_args = "embeddings=maybe"
    with pytest.raises(ValueError, match="Invalid embeddings: 'maybe'"):
        factory_kwargs(args)
    with pytest.raises(ValueError, match="Invalid optim_args: 'match' in 'match'"):
        parse_optim_args("match")


def test_multipliers_reach_the_angle(model: nn.Module) -> None:
    plain, doubled = (
        RotationalOptimizerFactory()(model, lr=1e-4, multipliers=multipliers) for multipliers in ((), ["^1.weight=2"])
    )
    assert angle(doubled) == 2 * angle(plain)
    with pytest.raises(ValueError, match="Invalid multipliers: 'mlp'"):
        RotationalConfig(multipliers=["mlp"])


@pytest.mark.parametrize(
    ("dtype", "settings", "warned"),
    [
        (torch.bfloat16, {"rounding": "nearest"}, True),
        (torch.bfloat16, {"rounding": "kahan"}, False),
        (torch.bfloat16, {"rounding": "nearest", "rotation": 0.01}, False),
        (torch.float16, {"rounding": "nearest", "rotation": 1e-3}, False),
        (torch.float16, {"rounding": "nearest", "rotation": 1e-4}, True),
        (torch.float32, {"rounding": "nearest"}, False),
        (torch.bfloat16, {}, False),
    ],
)
def test_steps_that_rounding_would_swallow_are_announced_with_the_remedy(
    model: nn.Module,
    info_lines: pytest.LogCaptureFixture,
    dtype: torch.dtype,
    settings: dict[str, Any],
    warned: bool,
) -> None:
    RotationalOptimizerFactory()(model.to(dtype), lr=1e-4, **settings)
    warnings = [record.message for record in info_lines.records if record.levelno == logging.WARNING]
    assert [("rounding='kahan'" in warning, str(dtype)[6:] in warning) for warning in warnings] == [
        (True, True)
    ] * warned


@pytest.mark.parametrize(
    ("dtype", "trains", "rounding"),
    [
        (torch.float32, True, "nearest"),
        (torch.bfloat16, True, "kahan"),
        (torch.float16, True, "kahan"),
        (torch.bfloat16, False, "nearest"),  # a frozen base, as with LoRA
    ],
)
def test_16_bit_weights_are_compensated_unless_said_otherwise(
    model: nn.Module, info_lines: pytest.LogCaptureFixture, dtype: torch.dtype, trains: bool, rounding: str
) -> None:
    model[0].to(dtype).requires_grad_(trains)
    optimizer = RotationalOptimizerFactory()(model, lr=1e-4)
    assert {group["rounding"] for group in optimizer.param_groups} == {rounding}
    said = [record.message for record in info_lines.records if "rounding='kahan'" in record.message]
    assert [str(dtype) in message for message in said] == [True] * (rounding == "kahan")


def test_config_round_trips() -> None:
    config = RotationalConfig(rotation=0.01, include=("head", "embed"), centering="weights", multipliers={"mlp": 0.5})
    assert RotationalConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="Unknown rotational setting: 'angle'"):
        RotationalConfig.from_dict({"angle": 1})
