"""RotationalTrainingArguments in Python, on a command line and in a file."""

import json
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_rotational import RotationalConfig, RotationalTrainingArguments
from hf_rotational.optim.factory import argument_name, factory_settings


def test_nothing_to_set_but_the_directory(tmp_path: Path) -> None:
    args = RotationalTrainingArguments(output_dir=str(tmp_path))
    assert args.optim == "rotational_adamw"
    assert args.warmup_steps == 0
    assert RotationalConfig(**factory_settings(args, args.optim)) == RotationalConfig()


def test_every_setting_has_an_argument_with_help() -> None:
    fields = RotationalTrainingArguments.__dataclass_fields__
    for setting in RotationalConfig.names():
        assert fields[argument_name(setting)].metadata["help"]


def test_command_line_and_file_agree(tmp_path: Path) -> None:
    values = {"output_dir": str(tmp_path), "rotation": 0.01, "rotation_exclude": ["query"], "optim": "rotational_adamw"}
    (tmp_path / "arguments.json").write_text(json.dumps(values), encoding="utf-8")
    parser = HfArgumentParser(RotationalTrainingArguments)
    (from_file,) = parser.parse_json_file(str(tmp_path / "arguments.json"))
    words = ["--output_dir", str(tmp_path), "--rotation", "0.01", "--rotation_exclude", "query"]
    (from_words,) = parser.parse_args_into_dataclasses(words)
    assert from_file.to_dict() == from_words.to_dict()
    assert from_words.rotation == 0.01
    assert factory_settings(from_words, from_words.optim)["exclude"] == ["query"]


def test_yaml_agrees_too(tmp_path: Path) -> None:
    """YAML reads 1e-7 as text, and a mapping as a mapping."""
    text = f"""
        output_dir: {tmp_path}
        optim: rotational_adamw
        rotation: match
        rotation_gains: learned
        rotation_gain_lr_multiplier: 3
        rotation_eps: 1e-7
        rotation_include: embed
        rotation_multipliers: {{mlp: 0.5}}
        weight_standardization: gain
    """
    (tmp_path / "arguments.yaml").write_text(text, encoding="utf-8")
    (args,) = HfArgumentParser(RotationalTrainingArguments).parse_yaml_file(str(tmp_path / "arguments.yaml"))
    config = RotationalConfig(**factory_settings(args, args.optim))
    expected = RotationalConfig(
        rotation="match",
        gains="learned",
        gain_lr_multiplier=3,
        rotational_eps=1e-7,
        include=("embed",),
        multipliers={"mlp": 0.5},
    )
    assert config == expected
    assert args.weight_standardization == "gain"


def test_arguments_round_trip_through_a_dict(tmp_path: Path) -> None:
    args = RotationalTrainingArguments(
        output_dir=str(tmp_path), rotation=0.01, rotation_multipliers=["mlp=0.5"], weight_standardization="drop_mean"
    )
    values = json.loads(json.dumps(args.to_dict()))
    (again,) = HfArgumentParser(RotationalTrainingArguments).parse_dict(values)
    assert again.to_dict() == args.to_dict()


def test_stock_optimizers_stay_available(tmp_path: Path) -> None:
    ours = RotationalTrainingArguments(output_dir=str(tmp_path), optim="adamw_torch")
    assert ours.optim == TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch").optim
    with pytest.raises(ValueError, match="rotational_adam_w"):
        RotationalTrainingArguments(output_dir=str(tmp_path), optim="rotational_adam_w")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rotation": "fast"}, "Invalid rotation: 'fast'"),
        ({"rotation_angle_weight_decay": -1.0}, "Invalid angle_weight_decay: -1.0"),
        ({"rotation_eps": "small"}, "Invalid rotational_eps: 'small'"),
        ({"optim_args": "speed=2"}, "Unknown optim_args key: 'speed'"),
        ({"rotation_logging_steps": -1}, "Invalid rotation_logging_steps: -1"),
        (
            {"weight_standardization": "both"},
            "Invalid weight_standardization: 'both' .must be one of none, function_pres",
        ),
        ({"optim": "adamw_torch", "weight_standardization": "both"}, "Invalid weight_standardization: 'both'"),
    ],
)
def test_bad_settings_are_refused_before_training(tmp_path: Path, setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotationalTrainingArguments(output_dir=str(tmp_path), **setting)  # type: ignore[arg-type]
