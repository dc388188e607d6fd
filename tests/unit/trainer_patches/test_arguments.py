"""The rotational fields of stock training arguments while they are patched."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments

import trainer_patches
from hf_rotational import RotationalConfig, RotationalTrainingArguments
from hf_rotational.errors import UserError
from hf_rotational.optim.factory import argument_name, factory_settings
from trainer_patches.arguments import script_fields

OURS = {f.name for f in dataclasses.fields(RotationalTrainingArguments)} - {
    f.name for f in dataclasses.fields(TrainingArguments)
}
GIVEN = {
    "optim": "rotational_adamw",
    "rotation": 0.01,
    "rotation_gains": "learned",
    "rotation_exclude": ["query", "key"],
    "rotation_embeddings": True,
    "rotation_eps": 1e-6,
    "rotation_logging_steps": 5,
    "weight_standardization": "gain",
}

each_class = pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments])


@pytest.fixture
def patched() -> Any:
    with trainer_patches.patched():
        yield


def test_there_are_all_settings_of_rotation_and_two_more() -> None:
    settings = {argument_name(name) for name in RotationalConfig.names()}
    assert set(script_fields()) == OURS == {*settings, "rotation_logging_steps", "weight_standardization"}


def expect(args: TrainingArguments) -> None:
    """Asserts that arguments are the given ones, and that they reach the optimizer."""
    assert {name: getattr(args, name) for name in GIVEN} == GIVEN
    config = RotationalConfig(**factory_settings(args, "rotational_adamw"))
    assert (config.rotation, config.gains, config.rotational_eps) == (0.01, "learned", 1e-6)
    assert (config.exclude, config.embeddings) == (("query", "key"), True)
    assert config.centering == args.rotation_centering == "none"


@each_class
def test_python_command_line_json_and_yaml_agree(patched: None, tmp_path: Path, cls: type[TrainingArguments]) -> None:
    expect(cls(output_dir=str(tmp_path), **GIVEN))
    words = [
        word
        for name, value in GIVEN.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [str(value)] if value is not True else []))
    ]
    parser = HfArgumentParser(cls)
    expect(parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])[0])
    for suffix in ("json", "yaml"):
        path = tmp_path / f"arguments.{suffix}"
        path.write_text(json.dumps({"output_dir": str(tmp_path), **GIVEN}), encoding="utf-8")  # is YAML too
        (args,) = parser.parse_json_file(str(path)) if suffix == "json" else parser.parse_yaml_file(str(path))
        expect(args)
        expect(HfArgumentParser(cls).parse_dict(args.to_dict())[0])


def test_subclasses_made_later_have_them(tmp_path: Path) -> None:
    with trainer_patches.patched():

        @dataclass
        class Later(TrainingArguments):
            extra: int = field(default=3, metadata={"help": "Of a script's own."})

        (args,) = HfArgumentParser(Later).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--optim", "rotational_lion", "--rotation", "match", "--extra", "4"]
        )
        assert (args.rotation, args.extra) == ("match", 4)
    # They outlive the patch, which takes the fields out of them.
    (args,) = HfArgumentParser(Later).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--extra", "5"])
    assert args.extra == 5
    assert not OURS & args.to_dict().keys()
    with trainer_patches.patched():
        args = Later(output_dir=str(tmp_path), optim="rotational_lion", rotation="match")
        assert args.to_dict()["rotation"] == "match"


@pytest.mark.parametrize("decorator", [dataclass, lambda cls: cls], ids=["dataclass", "class"])
def test_a_subclass_with_a_constructor_of_its_own_takes_them(tmp_path: Path, decorator: Any) -> None:
    @decorator
    class Own(TrainingArguments):
        def __init__(self, output_dir: str, **kwargs: Any) -> None:
            super().__init__(output_dir=output_dir, **kwargs)

    with trainer_patches.patched():
        expect(Own(str(tmp_path), **GIVEN))


@each_class
def test_constructors_say_so_and_take_what_they_took(
    patched: None, tmp_path: Path, cls: type[TrainingArguments]
) -> None:
    assert inspect.signature(cls).parameters.keys() >= OURS
    assert cls(str(tmp_path)).output_dir == str(tmp_path)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rotatoin'"):
        cls(output_dir=str(tmp_path), rotatoin="match")


def test_the_rotational_arguments_stay_what_they_are(patched: None, tmp_path: Path) -> None:
    args = RotationalTrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", rotation="match")
    assert args.rotation == "match"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rotation": "equilibrium"}, r"^--rotation would do nothing with --optim adamw_torch\w*: add --optim rot"),
        ({"rotation_gains": "learned", "rotation_exclude": ["a"]}, "^--rotation_gains, --rotation_exclude would do"),
        ({"rotation_embeddings": True, "optim": "sgd"}, "with --optim sgd"),
        ({"rotation": "fast", "optim": "rotational_sgd"}, "^Invalid rotation: 'fast'"),
        ({"rotation_logging_steps": -1}, "^Invalid rotation_logging_steps: -1"),
        ({"weight_standardization": "all"}, "^Invalid weight_standardization: 'all'"),
    ],
)
def test_what_cannot_be_used_is_refused(patched: None, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainingArguments(output_dir=str(tmp_path), **given)


def test_nothing_is_settled_for_runs_that_do_not_ask(patched: None, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path))
    assert {getattr(args, name) for name in OURS if not isinstance(getattr(args, name), list)} == {
        *(None, False, 0, "none")
    }
    asking = TrainingArguments(output_dir=str(tmp_path), optim="rotational_adamw")
    assert (asking.rotation, asking.rotation_logging_steps) == ("equilibrium", 25)


def test_optim_args_win(patched: None, tmp_path: Path) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), optim="rotational_adamw", rotation=0.01, optim_args="rotation=match"
    )
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert kwargs["rotation"] == "match"


def test_arguments_made_or_saved_before_work_in_a_patched_process(tmp_path: Path) -> None:
    args, file = TrainingArguments(output_dir=str(tmp_path)), io.BytesIO()
    torch.save(args, file)
    file.seek(0)
    with trainer_patches.patched():
        for old in (args, torch.load(file, weights_only=False)):
            assert old.to_dict()["weight_standardization"] == "none"
            Trainer(model=torch.nn.Linear(2, 2), args=old)


def test_the_help_shows_the_defaults_that_hold(patched: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    ours = shown[shown.index("--rotation ROTATION Target angle") :]
    assert "at the peak learning rate. (default: equilibrium)" in ours
    assert "(default: 25 with a rotational --optim, else 0)" in ours
    assert "(default: None)" not in ours
