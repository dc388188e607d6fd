"""What people switch on in a Trainer works with the rotational one: precision, compilation, search, adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import optuna
import peft
import pytest
import torch
import trl
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)

from hf_rotational import (
    RotationalAdamW,
    RotationalTrainer,
    RotationalTrainerMixin,
    RotationalTrainingArguments,
    RotationMonitor,
    plan,
)
from tests.helpers import ROTATIONAL, copies, each_optimizer, exactly_equal, gradient, make, parameters, train

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "max_steps": 8,
    "logging_steps": 4,
    "rotation_logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
ROWS = [[(7 * row + column) % 40 for column in range(6)] for row in range(64)]
LABELLED = Dataset.from_dict({"input_ids": ROWS, "labels": [row[0] % 2 for row in ROWS]})


def bert() -> BertForSequenceClassification:
    set_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def trainer(folder: Path, model: nn.Module | None = None, *callbacks: TrainerCallback, **settings: Any) -> Any:
    arguments = RotationalTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    return RotationalTrainer(
        model=bert() if model is None else model,
        args=arguments,
        train_dataset=LABELLED,
        eval_dataset=LABELLED,
        callbacks=list(callbacks),
    )


def norms(model: nn.Module) -> torch.Tensor:
    return torch.cat([entry.parameter.detach().float().norm(dim=1) for entry in plan(model).rotating])


def trained(folder: Path, **settings: Any) -> list[torch.Tensor]:
    run = trainer(folder, **settings)
    run.train()
    return copies(run.model.parameters())


def test_bf16_autocast_leaves_weights_and_angles_in_float32(tmp_path: Path) -> None:
    monitor = RotationMonitor(every=1)
    run = trainer(tmp_path, None, monitor, bf16=True)
    seen = []
    run.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    run.train()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    torch.testing.assert_close(norms(run.model), norms(bert()), rtol=1e-5, atol=0.0)
    # The first update is its own running average, so it turns by exactly the target.
    assert monitor.records[0]["rotation"] == pytest.approx(monitor.records[0]["target"], rel=1e-4)


def test_bfloat16_weights_follow_float32_ones_without_being_told(tmp_path: Path) -> None:
    def distance(name: str, model: nn.Module, **settings: Any) -> float:
        """How far the rotating weights are from where they began, squared."""
        start = [entry.parameter.detach().clone() for entry in plan(model).rotating]
        run = trainer(tmp_path / name, model, rotation=1e-3, lr_scheduler_type="constant", **settings)
        run.train()
        ends = [entry.parameter.detach() for entry in plan(run.model).rotating]
        return float(sum((end.float() - begin.float()).square().sum() for end, begin in zip(ends, start, strict=True)))

    wide = distance("wide", bert())
    # Kahan's weights are those of float32, rounded once; most steps are lost for good to rounding to nearest.
    assert distance("narrow", bert().bfloat16()) == pytest.approx(wide, rel=0.2)
    assert distance("lost", bert().bfloat16(), rotation_rounding="nearest") < 0.5 * wide


@each_optimizer
@pytest.mark.parametrize("gains", ["fixed", "learned"])
def test_a_step_the_gradient_scaler_skips_touches_nothing(build: Any, gains: str) -> None:
    if gains == "learned" and build is ROTATIONAL["NAdam"]:
        pytest.skip("wrapped optimizers learn no gains")
    Accelerator(cpu=True)  # the wrapper wants one to exist
    params, twins = parameters(torch.float32), parameters(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = AcceleratedOptimizer(make(build, params, gains=gains), scaler=scaler)
    expected = make(build, twins, gains=gains)
    for step in range(4):
        for place, parameter in enumerate(params):
            scale = scaler.get_scale() if scaler._scale is not None else 1024.0
            parameter.grad = scale * gradient(parameter, place, step)
        if step == 2:
            params[0].grad[0, 0] = torch.inf
        scaler.scale(torch.zeros(()))  # makes the scale
        before = copy.deepcopy(optimizer.optimizer.state_dict()["state"]), copies(params)
        optimizer.step()
        assert optimizer.step_was_skipped == (step == 2)
        if step == 2:
            exactly_equal(optimizer.optimizer.state_dict()["state"], before[0])
            exactly_equal(copies(params), before[1])
        else:
            train(expected, twins, [step])
    # Scales are powers of 2, which multiply without rounding.
    exactly_equal(copies(params), copies(twins))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        {"auto_find_batch_size": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_switches_that_should_not_change_numbers_do_not(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = trained(tmp_path / "plain")
    switched = trained(tmp_path / "switched", **settings)
    # Float32 sums in another order; 8 steps of 1e-3, each entry's at most the learning rate.
    torch.testing.assert_close(switched, plain, rtol=0.0, atol=2e-5)


def test_the_batch_size_is_found_after_running_out_of_memory(tmp_path: Path) -> None:
    class OutOfMemoryOnce(RotationalTrainer):
        failures = 1

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.failures and self.state.global_step == 2:
                self.failures = 0
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    arguments = RotationalTrainingArguments(
        output_dir=str(tmp_path), auto_find_batch_size=True, per_device_train_batch_size=16, **SETTINGS
    )
    run = OutOfMemoryOnce(model=bert(), args=arguments, train_dataset=LABELLED)
    run.train()
    assert run.state.train_batch_size < 16
    assert run.state.global_step == 8
    torch.testing.assert_close(norms(run.model), norms(bert()), rtol=1e-5, atol=0.0)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    settings = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
        "learning_rate": 0.3,  # so large that the last model is not the best
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "rotation_gains": "learned",
    }
    run = trainer(tmp_path, **settings)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name != "checkpoint-8"
    exactly_equal(copies(run.model.parameters()), copies(type(run.model).from_pretrained(best).parameters()))


def test_hyperparameter_search_over_the_angle(tmp_path: Path) -> None:
    angles = []

    class Noting(RotationalTrainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            optimizer = super().create_optimizer(model)
            angles.append(optimizer.target_rotation(next(g for g in optimizer.param_groups if g["rotational"])))
            return optimizer

    arguments = RotationalTrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    run = Noting(model_init=bert, args=arguments, train_dataset=LABELLED, eval_dataset=LABELLED)
    grid = {"rotation": [0.001, 0.01]}
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"rotation": trial.suggest_categorical("rotation", grid["rotation"])},
        backend="optuna",
        n_trials=2,
        sampler=optuna.samplers.GridSampler(grid),
        compute_objective=lambda metrics: metrics["eval_loss"],
        direction="minimize",
    )
    assert sorted(angles) == pytest.approx(grid["rotation"])
    assert best.hyperparameters["rotation"] in grid["rotation"]


def llama() -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=40,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_on_top_of_trls_trainer(tmp_path: Path, lora: bool) -> None:
    class RotationalSFTTrainer(RotationalTrainerMixin, trl.SFTTrainer):
        pass

    words = Tokenizer(WordLevel({str(number): number for number in range(40)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")
    model = llama()
    start = norms(model)
    run = RotationalSFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            learning_rate=1e-3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ROWS}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    run.train()
    optimizer = run.optimizer.optimizer
    assert isinstance(optimizer, RotationalAdamW)
    rotating = [parameter for parameter, _ in optimizer.rotating()]
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    if lora:
        names = {name for name, parameter in run.model.named_parameters() if any(parameter is r for r in rotating)}
        assert names
        assert all("lora_A" in name for name in names)
    else:
        torch.testing.assert_close(norms(run.model), start, rtol=1e-5, atol=0.0)
