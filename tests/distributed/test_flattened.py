"""What flattens parameters or cuts neurons up is refused, and what keeps them whole takes the steps of one process.

FSDP version 1 runs here on one rank. Run as a script, this file is what each of two ranks does under DeepSpeed, where
that is installed: ``DS_BUILD_OPS=0 pip install deepspeed``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_rotational import (
    RotationalAdamW,
    RotationalOptimizerFactory,
    RotationalTrainer,
    RotationalTrainingArguments,
    plan,
)
from hf_rotational.errors import UserError
from hf_rotational.training.distributed import check_deepspeed
from tests.distributed.ranks import launch, leave
from tests.helpers import exactly_equal

STEPS, BATCH, WORDS = 6, 8, 40
PIECES: dict[str, dict[str, Any]] = {
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3}},
    "AutoTP": {"zero_optimization": {"stage": 0}, "tensor_parallel": {"autotp_size": 2}},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "ZeRO stage 1": {"zero_optimization": {"stage": 1}},
    "ZeRO stage 2": {"zero_optimization": {"stage": 2}},
    "ZeRO stage 3": {"zero_optimization": {"stage": 3}},
    "tensor_parallel": {"tensor_parallel": {"autotp_size": 2}},
    r"its optimizer \(AdamW\)": {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
}
"""What a refusal says, to what is in the DeepSpeed config."""
AUTO: dict[str, Any] = {
    "zero_optimization": {"stage": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))


def rotational(model: nn.Module) -> RotationalAdamW:
    groups = plan(model).parameter_groups()
    return RotationalAdamW(groups, lr=1e-2, weight_decay=0.1, gains="learned")


def refusal(act: Callable[[], Any]) -> str:
    """What is said against it; nothing if it is done."""
    try:
        act()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# FSDP version 1


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore")  # it is deprecated, and says what it does with one rank
@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda model: RotationalAdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        rotational,
        lambda model: RotationalOptimizerFactory()(model, lr=1e-2),
    ],
    ids=["optimizer", "plan", "factory"],
)
def test_fsdp_version_1_is_refused(
    build: Callable[[nn.Module], Any], use_orig_params: bool, strategy: ShardingStrategy
) -> None:
    model = FullyShardedDataParallel(
        layers(), sharding_strategy=strategy, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"FSDP version 1 .* Use DDP or FSDP version 2"):
        build(model)


# DeepSpeed, by its config


def trainer_with(config: dict[str, Any] | None, **attributes: Any) -> Any:
    """As much of a Trainer as is asked before training begins."""
    plugin = SimpleNamespace(deepspeed_config=config)
    trainer: dict[str, Any] = {
        "args": SimpleNamespace(optim="rotational_adamw"),
        "accelerator": SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)),
        "is_deepspeed_enabled": config is not None,
        "optimizer": None,
        "optimizer_cls_and_kwargs": None,
    }
    return SimpleNamespace(**trainer | attributes)


@pytest.mark.parametrize("reason", CONFIGS)
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"args": SimpleNamespace(optim="adamw_torch"), "_rotational_optim": lambda: "rotational_adamw"},
        {"args": SimpleNamespace(optim="adamw_torch"), "optimizer_cls_and_kwargs": (RotationalOptimizerFactory, {})},
        {"args": SimpleNamespace(optim="adamw_torch"), "optimizer": RotationalAdamW(layers().parameters(), 1e-2)},
        {"args": SimpleNamespace(optim="adamw_torch"), "optimizer_cls_and_kwargs": (RotationalAdamW, {"lr": 1e-2})},
    ],
    ids=["named", "the mixin's default", "factory", "passed in", "class"],
)
def test_deepspeed_configs_are_refused(reason: str, attributes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"Invalid DeepSpeed config: {reason}"):
        check_deepspeed(trainer_with(CONFIGS[reason], **attributes))


def test_an_optimizer_deepspeed_would_not_use_is_refused() -> None:
    with pytest.raises(UserError, match="does not use the RotationalAdamW that was passed in"):
        check_deepspeed(trainer_with(AUTO, optimizer=RotationalAdamW(layers().parameters(), 1e-2)))


@pytest.mark.parametrize("reason", CONFIGS)
def test_other_optimizers_may_use_any_config(reason: str) -> None:
    check_deepspeed(trainer_with(CONFIGS[reason], args=SimpleNamespace(optim="adamw_torch")))
    for build in (torch.optim.SGD, lambda: torch.optim.SGD):
        check_deepspeed(trainer_with(CONFIGS[reason], optimizer_cls_and_kwargs=(build, {"lr": 1.0})))


def test_configs_that_keep_parameters_whole_are_taken() -> None:
    check_deepspeed(trainer_with(AUTO))
    check_deepspeed(trainer_with({}))
    check_deepspeed(trainer_with(None))


def test_a_first_step_without_gradients_is_not_taken() -> None:
    """DeepSpeed takes it over 16-bit weights, to make state; torch.optim.AdamW counts it."""
    rehearsed, plain = rotational(layers()), rotational(layers())
    for group in rehearsed.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    rehearsed.step()
    for optimizer in (rehearsed, plain):
        for step in range(3):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.full_like(parameter, step + 1.0).cumsum(0)
            optimizer.step()
    exactly_equal(rehearsed.state_dict()["state"], plain.state_dict()["state"])
    exactly_equal([g["params"] for g in rehearsed.param_groups], [g["params"] for g in plain.param_groups])


# DeepSpeed itself


def first_step(config: dict[str, Any]) -> str:
    """What is said at the first step, the parameters having been whole when the optimizer was built."""
    import deepspeed

    model, tokens = llama(), torch.arange(8).reshape(2, 4)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=rotational(model),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, **config},
    )

    def step() -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    return refusal(step)


def build_on_zero_3() -> list[str]:
    """What is said by an optimizer, a plan's optimizer and the factory for parameters that are not here."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = layers()
    assert all(parameter.shape == (0,) for parameter in model.parameters())
    return [
        refusal(lambda: RotationalAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)),
        refusal(lambda: rotational(model)),
        refusal(lambda: RotationalOptimizerFactory()(model, lr=1e-2)),
    ]


def half_precision() -> bool:
    """Whether a rank's bfloat16 weights are bit for bit those of a loop with a float32 copy."""
    import deepspeed

    model, weights, copy = layers(), layers().bfloat16(), layers().bfloat16().float()
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=rotational(model), config=config)
    optimizer = rotational(copy)
    for step in range(STEPS):
        batch = torch.arange(24.0).reshape(4, 6).mul(step + 1).sin().bfloat16()  # the ranks' gradients are the same
        engine.backward(engine(batch).float().square().mean())
        engine.step()
        weights(batch).float().square().mean().backward()
        for weight, parameter in zip(weights.parameters(), copy.parameters(), strict=True):
            assert weight.grad is not None
            parameter.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for weight, parameter in zip(weights.parameters(), copy.parameters(), strict=True):
                weight.copy_(parameter)
    return all(map(torch.equal, model.parameters(), weights.parameters()))


def llama() -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=WORDS,
    )
    return LlamaForCausalLM(config)


def trainer(folder: Path, batch: int, config: dict[str, Any] | None = None, **settings: Any) -> RotationalTrainer:
    rows = [[(7 * row + column**2) % WORDS for column in range(6)] for row in range(64)]
    args = RotationalTrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        max_grad_norm=0.5,
        rotation_gains="learned",
        rotation_logging_steps=2,
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        deepspeed=config,
        **settings,
    )
    return RotationalTrainer(
        model=llama(), args=args, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows})
    )


def train(folder: Path, batch: int, resume: bool = False, **settings: Any) -> tuple[list[Tensor], list[float | None]]:
    """Weights after a run, and its angles, measured."""
    here = trainer(folder, batch, **settings)
    here.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resume else None)
    weights = [parameter.detach().clone() for parameter in here.accelerator.unwrap_model(here.model).parameters()]
    return weights, [entry["rotation"] for entry in read(folder)]


def read(folder: Path) -> list[dict[str, Any]]:
    from hf_rotational.monitor.records import read_records

    return read_records(folder).steps


def train_with_deepspeed(folder: Path) -> None:
    """Everything that takes DeepSpeed on two ranks; the first writes down what it has seen."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    said: dict[str, Any] = {name: first_step(config) for name, config in PIECES.items() if name != "AutoTP"}
    said["built on stage 3"] = build_on_zero_3()
    said["half precision"] = half_precision()
    for reason, config in CONFIGS.items():
        said[reason] = refusal(trainer(folder, BATCH // 2, {**AUTO, **config}).train)
    for name, settings in {
        "whole": {},
        "accumulated": {"gradient_accumulation_steps": 2, "batch": BATCH // 4},
        "16 bit": {"bf16": True, "config": {**AUTO, "bf16": {"enabled": "auto"}}},
    }.items():
        settings = {"batch": BATCH // 2, "config": AUTO, **settings}
        trained = train(folder / name, **settings)
        resumed = train(folder / name, resume=True, **settings)
        if dist.get_rank() == 0:
            torch.save((trained, resumed), folder / f"{name}.pt")
    said["AutoTP"] = first_step(PIECES["AutoTP"])  # last: whatever follows would be tensor parallel
    if dist.get_rank() == 0:
        (folder / "said.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks under DeepSpeed have left what they have seen."""
    path: Path = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")
        launch(__file__, 2, str(path))
    return path


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    heard: dict[str, Any] = json.loads((folder / "said.json").read_text())
    return heard


@needs_deepspeed
@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_refused_at_the_first_step(said: dict[str, Any], name: str) -> None:
    assert re.match(r"RuntimeError: \d+ matrices of a parameter group, the first of", said[name])


@needs_deepspeed
def test_parameters_that_zero_3_has_emptied_are_refused(said: dict[str, Any]) -> None:
    for message in said["built on stage 3"]:
        assert message.startswith("ValueError: Invalid parameter of shape (0,): DeepSpeed ZeRO-3")


@needs_deepspeed
@pytest.mark.parametrize("reason", CONFIGS)
def test_the_trainer_refuses_the_config_before_it_trains(said: dict[str, Any], reason: str) -> None:
    assert said[reason].startswith("UserError: Invalid DeepSpeed config: " + reason.replace("\\", ""))


@needs_deepspeed
@pytest.mark.parametrize("name", ["whole", "accumulated"])
def test_without_zero_deepspeed_trains_as_one_process(folder: Path, tmp_path: Path, name: str) -> None:
    (weights, angles), _ = torch.load(folder / f"{name}.pt")
    alone, alone_angles = train(tmp_path, BATCH)
    # It has no float64; sums over ranks are rounded in another order, 6e-8 a step of weights up to 0.1.
    torch.testing.assert_close(weights, alone, rtol=0.0, atol=1e-6)
    assert angles == pytest.approx(alone_angles, rel=1e-4)


@needs_deepspeed
@pytest.mark.parametrize("name", ["whole", "accumulated", "16 bit"])
def test_deepspeed_resumes_bit_for_bit(folder: Path, name: str) -> None:
    trained, resumed = torch.load(folder / f"{name}.pt")
    exactly_equal(resumed, trained)


@needs_deepspeed
def test_deepspeed_steps_on_a_float32_copy_of_16_bit_weights(said: dict[str, Any]) -> None:
    assert said["half precision"]


if __name__ == "__main__":
    train_with_deepspeed(Path(sys.argv[1]))
    leave()
