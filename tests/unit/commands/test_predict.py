"""`hf-rotational predict`, without a model and on weights of known size."""

import math
import re
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, get_scheduler

from hf_rotational import cli, equilibrium, prediction
from hf_rotational.commands import predict
from hf_rotational.demo.model import packaged_model
from hf_rotational.errors import UserError
from hf_rotational.prediction import SCHEDULES, Layers, Run, study_layers

LR, WEIGHT_DECAY, STEPS = 5e-5, 0.01, 3000
RMS = {"query": 0.02, "key": 0.04, "value": 0.04, "attention.output": 0.04, "intermediate": 0.05, "pooler": 0.01}


def run(*argv: str) -> None:
    parser = ArgumentParser()
    predict.register(parser.add_subparsers())
    arguments = parser.parse_args(["predict", *argv])
    arguments.run(arguments)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command prints, white space made single."""
    run(*argv)
    return " ".join(capsys.readouterr().out.split())


def bert() -> BertModel:
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30)
    model = BertModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            rms = next((rms for part, rms in RMS.items() if part in name), 0.03)
            # Every entry of one size, with signs: the root mean square is exact.
            torch.nn.init.constant_(parameter, rms)
            parameter.data[:, ::2] *= -1
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert")
    bert().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("warmup_steps", [0, 5, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_transformers(schedule: str, warmup_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=20)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = Run("adamw", lr=1.0, steps=20, schedule=schedule, warmup_steps=warmup_steps).relative_lr()
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_the_sum_over_the_run_is_of_every_steps_angle() -> None:
    predicted = prediction.predict(Run("adamw", lr=LR, weight_decay=WEIGHT_DECAY, steps=50, warmup_steps=10))
    lrs = [LR * step / 10 for step in range(10)] + [LR * (50 - step) / 40 for step in range(10, 50)]
    records = [equilibrium.adamw(lr=lr, weight_decay=WEIGHT_DECAY) for lr in lrs]
    assert predicted.total_rotation == pytest.approx(sum(record.rotation or 0.0 for record in records))
    assert predicted.half_lives == pytest.approx(sum(1 / (record.half_life or math.nan) for record in records))


def test_a_table_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--lr", "5e-5", "--weight_decay", "0.01", "--steps", "3000")
    assert "rotation 0.000229 rad per step" in text
    # sqrt(2 * 5e-5 * 0.01 * 0.1/1.9) = 2.294e-4, times the sum of sqrt(1 - t/3000): 2000.5
    assert "0.459 rad" in text
    assert "norm 0.05 sqrt(fan-in)" in text
    assert "half-life 693,147 steps" in text
    assert "Equilibrium is never reached in this run: the half-life is 693,147 steps and the run has 3,000" in text


@pytest.mark.parametrize("steps", [2000, 3000])
def test_the_half_life_against_the_run(steps: int) -> None:
    # 693 steps at the peak: 1.4 and 2.2 half-lives of a linear schedule; 4.3 of a constant one of 3,000 steps.
    def advice(schedule: str) -> str:
        planned = Run("adamw", lr=5e-3, weight_decay=0.1, steps=steps, schedule=schedule)
        return " ".join(predict.advice(prediction.predict(planned), None))

    assert "approached in this run, not reached" in advice("linear")
    assert ("Equilibrium is reached in this run, after about 2,773 steps" in advice("constant")) is (steps == 3000)


def test_without_weight_decay_the_angle_is_the_trainers(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--lr", "5e-5", "--steps", "3000")
    assert "Equilibrium at weight decay 0.1" in text
    assert f"{equilibrium.adamw(lr=5e-5, weight_decay=0.1).rotation:.3g} rad per step" in text
    assert "AdamW has none without weight decay. Rotational optimizers then use weight decay 0.1" in text


def test_what_depends_on_the_gradient_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "--optim", "sgd", "--lr", "0.1", "--weight_decay", "1e-4", "--momentum", "0.9", "--steps", "9"
    )
    assert "norm depends on the gradient" in text
    assert "half-life 1,733 steps" in text
    assert "fourth power of the norm" in text
    text = printed(capsys, "--optim", "adam", "--lr", "1e-3", "--weight_decay", "0.1", "--steps", "9")
    assert "half-life depends on the gradient" in text
    assert f"{equilibrium.adamw(lr=1e-3, weight_decay=0.1).rotation:.3g} rad per step" in text
    assert "which rotational_adam imposes" in text


@pytest.mark.parametrize(("beta2", "warns"), [("0.99", False), ("0.999", True)])
def test_lion_where_its_closed_form_does_not_hold(capsys: pytest.CaptureFixture[str], beta2: str, warns: bool) -> None:
    text = printed(
        capsys, *("--optim", "lion", "--lr", "5e-4", "--weight_decay", "1", "--steps", "99", "--adam_beta2", beta2)
    )
    assert ("Here it is 0.5 times that" in text) is warns


def test_a_rotational_name_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    rest = ("--lr", "1e-4", "--weight_decay", "0.1", "--steps", "10")
    assert printed(capsys, "--optim", "rotational_lion", *rest) == printed(capsys, "--optim", "lion", *rest)


@pytest.fixture(scope="module")
def layers() -> Layers:
    return study_layers(bert(), prediction.predict(Run("adamw", lr=LR, weight_decay=WEIGHT_DECAY, steps=STEPS)))


def test_layers_are_compared_with_equilibrium(layers: Layers) -> None:
    kinds = {layer.name: layer for layer in layers.kinds}
    assert layers.count == 13
    assert len(kinds) == 7
    query = kinds["encoder.layer.*.attention.self.query"]
    assert (query.count, query.fan_in) == (2, 16)
    assert query.rms == pytest.approx(0.02)
    assert query.norm == pytest.approx(0.02 * 4)
    assert query.over_equilibrium == pytest.approx(0.02 / math.sqrt(LR / (2 * WEIGHT_DECAY)))
    assert query.adamw == pytest.approx(LR * math.sqrt(0.1 / 1.9) / 0.02)
    assert kinds["encoder.layer.*.output.dense"].fan_in == 24
    assert (layers.fastest.name, layers.slowest.adamw) == ("pooler.dense", pytest.approx(query.adamw * 0.02 / 0.05))


def test_match_is_the_optimizers_own_angle(layers: Layers) -> None:
    # Twice what independent updates give, at the median: five of the layers' six weights are 0.04 or below, twice.
    assert layers.median.rms == pytest.approx(0.04)
    assert layers.match == pytest.approx(2 * layers.median.adamw)
    assert equilibrium.adamw(lr=LR, weight_decay=layers.match_weight_decay).rotation == pytest.approx(layers.match)


def test_many_kinds_of_layers_are_shown_by_module_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "MAX_KINDS", 6)
    found = study_layers(bert(), prediction.predict(Run("sgd", lr=0.1, steps=10)))
    assert [(layer.name, layer.count, layer.over_equilibrium) for layer in found.kinds] == [("Linear", 13, None)]


def test_a_table_with_a_model(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--lr", "5e-5", "--weight_decay", "0.01", "--steps", "3000", "--model", folder)
    assert "BertModel: 13 weights rotate" in text
    # lr sqrt(0.1/1.9)/0.02 = 5.74e-4, times the sum of the schedule, 1500.5
    assert "encoder.layer.*.attention.self.query 2 16 0.02 0.08 0.4 5.74e-04 0.86" in text
    assert "AdamW at the start: the median layer 2.87e-04 0.43" in text
    assert 'rotational, rotation="match" 5.74e-04 0.861' in text
    assert "pooler.dense 5.0 times as fast as encoder.layer.0.intermediate.dense" in text
    assert 'rotation="equilibrium" turns 2.5 times slower than rotation="match"' in text
    assert "Weight decay 0.063 would make them equal" in text


def test_a_real_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--lr", "5e-5", "--steps", "100", "--schedule", "constant", "--model", str(packaged_model()))
    assert "BertModel: 37 weights rotate" in text
    assert "AdamW at the start: the median layer 1.78e-04 0.0178" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "0"), "Invalid lr: 0.0 (must be a finite number > 0)"),
        (("--weight_decay", "-1"), "Invalid weight_decay: -1.0 (must be a finite number >= 0)"),
        (("--steps", "0"), "Invalid steps: 0"),
        (("--warmup_steps", "11"), "Invalid warmup_steps: 11 (must be from 0 to steps, 10)"),
        (("--adam_beta2", "1"), "Invalid betas[1]: 1.0"),
        (("--optim", "sgd", "--momentum", "1"), "Invalid momentum: 1.0"),
    ],
)
def test_what_cannot_be_used_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        run("--lr", "1e-4", "--steps", "10", *arguments)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config of a model at"):
        run("--lr", "1e-4", "--steps", "10", "--model", str(tmp_path))


def test_the_command_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["predict", "--lr", "1e-4", "--steps", "10"])
    assert "half-life" in capsys.readouterr().out
