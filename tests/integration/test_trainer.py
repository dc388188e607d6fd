"""RotationalTrainer and the stock Trainer with our factory, trained and looked at from outside."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import trainer_patches
from hf_rotational import (
    RotationalOptimizerFactory,
    RotationalSeq2SeqTrainer,
    RotationalTrainer,
    RotationalTrainingArguments,
    RotationMonitor,
    plan,
)
from hf_rotational.monitor.records import read_records
from hf_rotational.optim.config import ANGLE_WEIGHT_DECAYS
from hf_rotational.optim.factory import OPTIMIZERS

SETTINGS = {"learning_rate": 1e-3, "max_steps": 12, "logging_steps": 4, "use_cpu": True, "disable_tqdm": True}


def model() -> BertForSequenceClassification:
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=40)
    )


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    rows = [[(7 * row + column) % 40 for column in range(6)] for row in range(64)]
    return Dataset.from_dict({"input_ids": rows, "labels": [row[0] % 2 for row in rows]})


def norms(module: nn.Module) -> torch.Tensor:
    return torch.cat([entry.parameter.detach().norm(dim=1) for entry in plan(module).rotating])


def test_trains_at_constant_norm_and_saves_a_plain_checkpoint(tmp_path: Path, dataset: Dataset) -> None:
    trained, start = model(), norms(model())
    monitor = RotationMonitor(every=1)
    trainer = RotationalTrainer(
        model=trained,
        args=RotationalTrainingArguments(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=dataset,
        callbacks=[monitor],
    )
    trainer.train()
    trainer.save_model()

    torch.testing.assert_close(norms(trained), start, rtol=1e-5, atol=0.0)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(trained.named_parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    assert [record["step"] for record in monitor.records] == list(range(1, 13))
    # The first step has no history: its update is its own running average, so it turns by exactly the target.
    assert monitor.records[0]["rotation"] == pytest.approx(monitor.records[0]["target"], rel=1e-4)
    assert read_records(tmp_path).steps == monitor.records
    logged = [entry["rotation_target"] for entry in trainer.state.log_history if "loss" in entry]
    targets = [record["target"] for record in monitor.records]
    assert logged == pytest.approx([sum(targets[step : step + 4]) / 4 for step in (0, 4, 8)])


def test_the_factory_in_the_stock_trainer_gives_the_same_weights(tmp_path: Path, dataset: Dataset) -> None:
    ours = RotationalTrainer(
        model=model(), args=RotationalTrainingArguments(output_dir=str(tmp_path), **SETTINGS), train_dataset=dataset
    )
    ours.train()
    stock = Trainer(
        model=model(),
        args=TrainingArguments(output_dir=str(tmp_path), **SETTINGS),
        train_dataset=dataset,
        optimizer_cls_and_kwargs=(RotationalOptimizerFactory, {"optim": "rotational_adamw", "lr": 1e-3}),
    )
    stock.train()
    for (name, first), second in zip(ours.model.named_parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize(("optim", "rotates"), [({}, True), ({"optim": "adamw_torch"}, False)])
def test_with_others_arguments_it_rotates_unless_they_name_an_optimizer(
    tmp_path: Path, dataset: Dataset, optim: dict[str, str], rotates: bool
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS, **optim)
    trainer = RotationalTrainer(model=model(), args=args, train_dataset=dataset)
    trainer.train()
    assert torch.allclose(norms(trainer.model), norms(model()), rtol=1e-5, atol=0.0) == rotates


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_flag_trains_and_says_once_where_its_angle_comes_from(
    tmp_path: Path, dataset: Dataset, optim: str
) -> None:
    with trainer_patches.patched():
        args = TrainingArguments(output_dir=str(tmp_path), optim=optim, log_level="info", **SETTINGS)
        trainer = Trainer(model=model(), args=args, train_dataset=dataset)
        start = [entry.parameter.detach().clone() for entry in plan(trainer.model).rotating]
        verbosity = logging.get_verbosity()
        logging.set_verbosity(args.get_process_log_level())  # as the stock scripts do
        try:
            with CaptureLogger(logging.get_logger("transformers")) as said:
                trainer.train()
        finally:
            logging.set_verbosity(verbosity)
    assert said.out.count(f"the angle uses weight decay {ANGLE_WEIGHT_DECAYS[optim]} (angle_weight_decay)") == 1
    torch.testing.assert_close(norms(trainer.model), norms(model()), rtol=1e-5, atol=0.0)
    for before, entry in zip(start, plan(trainer.model).rotating, strict=True):
        assert not torch.equal(before, entry.parameter), entry.name


def test_sequence_to_sequence_rotates_by_optim_args_and_generates(tmp_path: Path) -> None:
    set_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    trained = T5ForConditionalGeneration(config)
    rows = [[(3 * row + column) % 28 + 2 for column in range(6)] for row in range(16)]
    pairs = Dataset.from_dict({"input_ids": rows, "labels": rows})
    start = norms(trained)
    trainer = RotationalSeq2SeqTrainer(
        model=trained,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), optim_args="rotation=0.01", predict_with_generate=True, **SETTINGS
        ),
        train_dataset=pairs,
        eval_dataset=pairs,
    )
    trainer.train()
    torch.testing.assert_close(norms(trained), start, rtol=1e-5, atol=0.0)
    optimizer = trainer.optimizer.optimizer
    assert {group["rotation"] for group in optimizer.param_groups if group["rotational"]} == {0.01}
    assert trainer.predict(pairs).predictions.shape[0] == len(rows)


def test_with_a_stock_optimizer_it_is_the_stock_trainer(tmp_path: Path, dataset: Dataset) -> None:
    arguments = {**SETTINGS, "output_dir": str(tmp_path), "optim": "adamw_torch"}
    ours = RotationalTrainer(model=model(), args=RotationalTrainingArguments(**arguments), train_dataset=dataset)
    ours.train()
    stock = Trainer(model=model(), args=TrainingArguments(**arguments), train_dataset=dataset)
    stock.train()
    for first, second in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_resumed_equals_uninterrupted(tmp_path: Path, dataset: Dataset) -> None:
    arguments = {**SETTINGS, "output_dir": str(tmp_path), "save_steps": 6, "rotation": "match"}

    def trainer() -> RotationalTrainer:
        args = RotationalTrainingArguments(**arguments)
        return RotationalTrainer(model=model(), args=args, train_dataset=dataset)

    # One after the other: constructing a Trainer seeds the dropout of what trains next.
    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name
