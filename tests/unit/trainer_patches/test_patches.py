"""apply(), revert() and patched() on the installed Transformers."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, is_optimizer_factory
from transformers.training_args import OptimizerNames

import trainer_patches
from hf_rotational import RotationalTrainingArguments
from hf_rotational.optim.factory import OPTIMIZERS, RotationalOptimizerFactory
from trainer_patches import patches

NAME = "rotational_adamw"


@pytest.fixture(autouse=True)
def unpatched():
    """Each test begins with plain Transformers and leaves it so."""
    before = touched()
    assert NAME not in _OPTIMIZER_HANDLERS
    yield
    trainer_patches.revert()
    assert touched() == before


CLASSES = (OptimizerNames, TrainingArguments, Seq2SeqTrainingArguments, RotationalTrainingArguments, Trainer)


def touched() -> tuple[dict[tuple[str, str], object], ...]:
    """What a patch could change: all that the classes hold, copies of the containers among it, and the handlers."""
    held = {
        (cls.__name__, key): value
        for cls in CLASSES
        for key, value in vars(cls).items()
        if key != "__slotnames__"  # left by pickle
    }
    copies = {key: copy.copy(value) for key, value in held.items() if isinstance(value, list | dict)}
    return held, copies, {("handlers", key): value for key, value in _OPTIMIZER_HANDLERS.items()}


def arguments(tmp_path, **kwargs) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **kwargs)


def test_apply_registers_every_optimizer():
    trainer_patches.apply()
    for name in OPTIMIZERS:
        assert OptimizerNames(name).value == name
        assert _OPTIMIZER_HANDLERS[OptimizerNames(name)] is _OPTIMIZER_HANDLERS[name]


def test_apply_is_idempotent():
    trainer_patches.apply()
    once = touched()
    trainer_patches.apply()
    assert touched() == once


def test_revert_restores_everything():
    before = touched()
    trainer_patches.apply()
    patched = {name for (name, key), value in touched()[0].items() if before[0].get((name, key)) is not value}
    assert patched == {"OptimizerNames", "TrainingArguments", "Seq2SeqTrainingArguments", "Trainer"}
    trainer_patches.revert()
    after = touched()

    assert after == before
    for now, then in ((after[0], before[0]), (after[2], before[2])):
        assert [key for key, value in then.items() if now[key] is not value] == []


def test_revert_without_apply_changes_nothing():
    before = touched()
    trainer_patches.revert()
    assert touched() == before


def test_apply_after_revert():
    trainer_patches.apply()
    trainer_patches.revert()
    trainer_patches.apply()
    assert OptimizerNames(NAME).value == NAME


def test_patched_lasts_for_the_block():
    with trainer_patches.patched():
        assert NAME in _OPTIMIZER_HANDLERS
    assert NAME not in _OPTIMIZER_HANDLERS


def test_patched_reverts_after_an_error():
    with pytest.raises(KeyError), trainer_patches.patched():
        raise KeyError
    assert NAME not in _OPTIMIZER_HANDLERS


def test_patched_leaves_an_outer_patch_in_place():
    with trainer_patches.patched():
        with trainer_patches.patched():
            pass
        assert NAME in _OPTIMIZER_HANDLERS


def test_a_failing_apply_leaves_nothing_behind(monkeypatch):
    monkeypatch.setitem(_OPTIMIZER_HANDLERS, NAME, lambda context: None)
    before = touched()
    with pytest.raises(ValueError, match="another package already handles optim='rotational_adamw'"):
        trainer_patches.apply()
    assert touched() == before
    assert patches._applied is None


def test_argument_parsers_know_the_name_only_while_patched(tmp_path, capsys):
    command_line = ["--output_dir", str(tmp_path), "--optim", NAME, "--optim_args", "rotation=match"]
    with trainer_patches.patched():
        (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command_line)
        assert args.optim is OptimizerNames(NAME)
        assert args.to_dict()["optim"] == NAME
    with pytest.raises(SystemExit):
        HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(command_line)
    assert f"invalid choice: '{NAME}'" in capsys.readouterr().err


def test_the_trainer_gets_the_factory_and_its_arguments(tmp_path):
    with trainer_patches.patched():
        args = arguments(tmp_path, optim=NAME, optim_args="rotation=match, centering=updates", learning_rate=3e-4)
        factory, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)

    assert is_optimizer_factory(factory)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = factory()(model, **kwargs)
    assert factory is RotationalOptimizerFactory
    assert type(optimizer) is OPTIMIZERS[NAME]
    (rotational,) = [group for group in optimizer.param_groups if group["rotational"]]
    assert (rotational["lr"], rotational["rotation"], rotational["centering"]) == (3e-4, "match", "updates")


def test_an_unknown_option_is_refused_with_the_valid_ones(tmp_path):
    with trainer_patches.patched(), pytest.raises(ValueError, match=r"'spin'.*valid:.*rotation.*centering"):
        arguments(tmp_path, optim=NAME, optim_args="spin=fast")


def test_other_optimizers_are_untouched(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch")
    expected = Trainer.get_optimizer_cls_and_kwargs(args)
    with trainer_patches.patched():
        assert Trainer.get_optimizer_cls_and_kwargs(args) == expected


def test_saved_arguments_load_where_nothing_is_patched(tmp_path):
    file = io.BytesIO()
    with trainer_patches.patched():
        args = arguments(tmp_path, optim=NAME)
        torch.save(args, file)
        assert copy.deepcopy(args).optim is args.optim

    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded.optim) is str
    assert loaded.optim == NAME
    with pytest.raises(ValueError, match="unsupported optimizer: rotational_adamw"):
        Trainer.get_optimizer_cls_and_kwargs(loaded)
    with trainer_patches.patched():  # and are as good as new ones where it is
        assert Trainer.get_optimizer_cls_and_kwargs(loaded)[0] is RotationalOptimizerFactory
