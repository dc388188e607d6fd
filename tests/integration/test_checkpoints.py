"""Resumed runs are the runs that were not interrupted, bit for bit; checkpoints are plain; bad ones are refused.

Run as a script, this file is what each of two processes does.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import trainer_patches
from hf_rotational import RotationalTrainer, RotationalTrainingArguments
from hf_rotational.training.checkpoint import RAW_WEIGHTS_NAME
from tests.distributed.ranks import launch, leave
from tests.helpers import exactly_equal
from tests.standardized import difference, logits, make

STEPS, SAVED = 6, 3
SETTINGS = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_steps": STEPS,
    "save_steps": SAVED,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
ROTATIONAL = {"optim": "rotational_adamw"}
STANDARDIZED = {"optim": "adamw_torch", "weight_standardization": "function_preserving"}
BEST = {"eval_strategy": "steps", "eval_steps": SAVED, "load_best_model_at_end": True, "greater_is_better": True}
"""The best model is the one of highest loss, so that it is not the last."""


def rows(name: str) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 3} for i in range(16)]
    tokens = torch.randint(1, 40, (16, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(folder: Path, name: str = "gpt2", patched: bool = False, **settings: Any) -> Any:
    """A RotationalTrainer, or the stock Trainer of a process that is patched, with the same model each time."""
    cls, arguments = (Trainer, TrainingArguments) if patched else (RotationalTrainer, RotationalTrainingArguments)
    dtype = torch.bfloat16 if settings.get("rotation_rounding") == "kahan" else torch.float32
    args = arguments(output_dir=str(folder), **{**SETTINGS, **settings})
    return cls(model=make(name, dtype), args=args, train_dataset=rows(name), eval_dataset=rows(name))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """As they are, those that weights are computed from among them."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses(trained: Any) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def checkpoint(folder: Path, step: int = SAVED) -> Path:
    return folder / f"checkpoint-{step}"


@pytest.mark.parametrize(
    ("name", "settings", "patched"),
    [
        ("gpt2", ROTATIONAL, False),
        ("vit", ROTATIONAL, False),
        ("mixtral", ROTATIONAL, True),
        ("vit", {"optim": "adamw_torch"}, False),
        ("gpt2", {**ROTATIONAL, "rotation_gains": "learned", "rotation_centering": "learned"}, False),
        ("mixtral", {**ROTATIONAL, "rotation_rounding": "kahan"}, False),
        ("gpt2", {**STANDARDIZED, "weight_standardization": "gain"}, True),
        ("t5", {**STANDARDIZED, "weight_standardization": "drop_mean"}, False),
        ("mixtral", STANDARDIZED, True),
        ("vit", {**STANDARDIZED, **ROTATIONAL}, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_resumed_equals_uninterrupted(tmp_path: Path, name: str, settings: dict[str, Any], patched: bool) -> None:
    with trainer_patches.patched() if patched else nullcontext():
        whole = trainer(tmp_path, name, patched, **settings)
        before = parameters(whole.model)
        whole.train()
        resumed = trainer(tmp_path, name, patched, **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    exactly_equal(parameters(resumed.model), parameters(whole.model))
    assert losses(resumed) == losses(whole)
    assert all(
        (parameter != before[name]).any() for name, parameter in whole.model.named_parameters() if name in before
    )


def test_a_matrix_that_starts_at_zero_resumes_too(tmp_path: Path) -> None:
    def begun(folder: Path) -> Any:
        started = trainer(folder, **ROTATIONAL)
        torch.nn.init.zeros_(started.model.get_parameter("transformer.h.0.mlp.c_fc.weight"))
        return started

    whole = begun(tmp_path)
    whole.train()
    resumed = begun(tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    exactly_equal(parameters(resumed.model), parameters(whole.model))
    assert whole.model.get_parameter("transformer.h.0.mlp.c_fc.weight").any()


def test_what_another_process_cannot_resume_from_none_does(tmp_path: Path) -> None:
    trainer(tmp_path, **ROTATIONAL).train()
    last = checkpoint(tmp_path, STEPS)
    (last / "rng_state_1.pth").write_bytes((last / "rng_state.pth").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"checkpoint-6.*: rng_state_1\.pth is damaged"):
        trainer(tmp_path, **ROTATIONAL).train(resume_from_checkpoint=str(last))
    resumed = trainer(tmp_path, **ROTATIONAL)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == STEPS


def test_a_new_run_sets_aside_what_an_earlier_one_left_to_be_read(tmp_path: Path) -> None:
    before = trainer(tmp_path, **ROTATIONAL)
    before.train()
    before.save_state()
    before.save_metrics("eval", before.evaluate())
    time.sleep(0.05)
    anew = trainer(tmp_path, **ROTATIONAL)
    anew.save_metrics("zero_shot", {"zero_shot_loss": 1.0})
    anew.train()
    found = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert {"trainer_state.json.old", "rotation.jsonl.old", "eval_results.json.old"} < found
    assert {"zero_shot_results.json", "rotation.jsonl"} < found
    assert found.isdisjoint({"trainer_state.json", "eval_results.json"})


def test_the_stock_loader_is_what_it_was_for_runs_that_do_not_ask(tmp_path: Path) -> None:
    """It does not restore this model; if it does one day, the loader here can go."""
    settings = {"name": "mixtral", "patched": True, "optim": "adamw_torch"}
    with trainer_patches.patched():
        whole = trainer(tmp_path, **settings)
        whole.train()
        resumed = trainer(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    stock = trainer(tmp_path, **settings)
    stock.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    exactly_equal(parameters(resumed.model), parameters(stock.model))
    assert losses(stock) != losses(whole)


class Remember(TrainerCallback):
    """Keeps the parameters that a checkpoint is saved of."""

    def __init__(self) -> None:
        self.saved: dict[int, dict[str, Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved[state.global_step] = parameters(kwargs["model"])


@pytest.mark.parametrize("save_only_model", [False, True])
@pytest.mark.parametrize(("name", "settings"), [("mixtral", ROTATIONAL), ("gpt2", STANDARDIZED), ("vit", STANDARDIZED)])
def test_the_best_model_is_loaded_exactly(
    tmp_path: Path, name: str, settings: dict[str, Any], save_only_model: bool
) -> None:
    trained, remember = trainer(tmp_path, name, **settings, **BEST, save_only_model=save_only_model), Remember()
    trained.add_callback(remember)
    trained.train()
    assert trained.state.best_model_checkpoint == str(checkpoint(tmp_path))
    exactly_equal(parameters(trained.model), remember.saved[SAVED])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of finished runs of GPT-2."""
    folders = {}
    for name, settings in (("rotational", ROTATIONAL), ("standardized", STANDARDIZED)):
        folders[name] = tmp_path_factory.mktemp(name)
        trained = trainer(folders[name], **settings)
        trained.train()
        trained.save_model()
        torch.save(logits(trained.model), folders[name] / "logits.pt")
    return folders


@pytest.mark.parametrize("run", ["rotational", "standardized"])
def test_what_is_saved_is_plain(finished: dict[str, Path], run: str) -> None:
    folder = finished[run]
    cls = type(make("gpt2"))
    for saved in (folder, checkpoint(folder), checkpoint(folder, STEPS)):
        model, info = cls.from_pretrained(saved, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.state_dict().keys() == make("gpt2").state_dict().keys()
        # One sum of products in another order.
        assert difference(torch.load(folder / "logits.pt"), logits(model)) < 1e-5 or saved == checkpoint(folder)
    assert (checkpoint(folder) / RAW_WEIGHTS_NAME).is_file() == (run == "standardized")
    assert not list(folder.glob("_*"))
    assert not list(checkpoint(folder).glob("*.unfinished"))


def edited(change: Callable[[dict[str, Tensor]], Any], name: str = "model.safetensors") -> Callable[[Path], None]:
    """What changes the tensors in a file of a checkpoint."""

    def edit(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, metadata={"format": "pt", "modes": "function_preserving"})

    return edit


def cut(name: str) -> Callable[[Path], None]:
    """What cuts the end off a file of a checkpoint."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def removed(name: str) -> Callable[[Path], None]:
    """What removes a file of a checkpoint."""
    return lambda folder: (folder / name).unlink()


def of_another_model(folder: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    BertForSequenceClassification(config).save_pretrained(folder)


WEIGHT, RAW = "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.parametrizations.weight.original"


@pytest.mark.parametrize(
    ("run", "damage", "message"),
    [
        ("rotational", edited(lambda state: state.pop(WEIGHT)), rf"GPT2LMHeadModel: .*1 missing \({WEIGHT}\)"),
        (
            "rotational",
            edited(lambda state: state.update({WEIGHT: torch.zeros(16, 60)})),
            rf"misshapen \({WEIGHT}\)",
        ),
        ("rotational", edited(lambda state: state.pop("transformer.wte.weight")), "2 missing"),
        ("rotational", of_another_model, "does not fit GPT2LMHeadModel"),
        ("rotational", cut("model.safetensors"), r"model\.safetensors"),
        ("rotational", removed("model.safetensors"), "Can't find a valid checkpoint"),
        ("rotational", removed("optimizer.pt"), r"holds no optimizer\.pt"),
        ("rotational", cut("optimizer.pt"), r"optimizer\.pt is damaged"),
        ("rotational", cut("rng_state.pth"), r"rng_state\.pth is damaged"),
        ("rotational", cut("trainer_state.json"), r"trainer_state\.json is missing or damaged"),
        ("rotational", removed("trainer_state.json"), r"trainer_state\.json is missing or damaged"),
        ("standardized", removed(RAW_WEIGHTS_NAME), f"holds no {RAW_WEIGHTS_NAME}"),
        ("standardized", cut(RAW_WEIGHTS_NAME), RAW_WEIGHTS_NAME),
        ("standardized", edited(lambda state: state.pop(RAW), RAW_WEIGHTS_NAME), rf"1 missing \({RAW}\)"),
        ("standardized", edited(lambda state: state.pop(WEIGHT)), rf"1 missing \({WEIGHT}\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_bad_checkpoint_is_refused_by_name_and_changes_nothing(
    tmp_path: Path, finished: dict[str, Path], run: str, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(checkpoint(finished[run]), tmp_path / "checkpoint-3")
    damage(folder)
    resumed = trainer(tmp_path, **(ROTATIONAL if run == "rotational" else STANDARDIZED))
    plain = {name: tensor.clone() for name, tensor in resumed.model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refusal:
        resumed.train(resume_from_checkpoint=str(folder))
    assert str(folder) in str(refusal.value)
    for name, tensor in resumed.model.state_dict().items():
        # Standardized in between, where it is: the same weights up to rounding.
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=1e-6 if run == "standardized" else 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("vit.encoder.layer.0.output.dense.weight"),
        lambda state: state.update({"vit.encoder.layer.0.output.dense.weight": torch.zeros(16, 23)}),
        lambda state: state.update({"vit.encoder.layer.7.output.dense.weight": torch.zeros(16, 24)}),
    ],
    ids=["missing", "misshapen", "unknown"],
)
def test_so_is_one_whose_names_are_converted(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    trainer(tmp_path, "vit", **ROTATIONAL).train()
    edited(change)(checkpoint(tmp_path))
    resumed = trainer(tmp_path, "vit", **ROTATIONAL)
    before = parameters(resumed.model)
    with pytest.raises(ValueError, match=r"does not fit ViTForImageClassification.*layers?\.[07]\."):
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path)))
    exactly_equal(parameters(resumed.model), before)


@pytest.mark.parametrize(
    ("run", "settings", "message"),
    [
        ("rotational", STANDARDIZED, "trained without weight_standardization"),
        ("standardized", ROTATIONAL, "resumed with the weight_standardization it was trained with"),
        (
            "standardized",
            {**STANDARDIZED, "weight_standardization": "drop_mean"},
            "does not fit GPT2.*unknown",
        ),
    ],
)
def test_standardization_has_to_be_what_it_was(
    tmp_path: Path, finished: dict[str, Path], run: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings).train(resume_from_checkpoint=str(checkpoint(finished[run])))


def test_modes_with_the_same_tensors_are_told_apart(tmp_path: Path) -> None:
    trainer(tmp_path, **{**STANDARDIZED, "weight_standardization": "gain"}).train()
    resumed = trainer(tmp_path, **{**STANDARDIZED, "weight_standardization": "drop_mean"})
    with pytest.raises(ValueError, match="trained with weight_standardization gain, not drop_mean"):
        resumed.train(resume_from_checkpoint=str(checkpoint(tmp_path)))


def test_a_checkpoint_in_shards_is_loaded_whole(tmp_path: Path) -> None:
    whole = trainer(tmp_path, **ROTATIONAL)
    whole.train()
    folder = checkpoint(tmp_path)
    model = type(whole.model).from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    resumed = trainer(tmp_path, **ROTATIONAL)
    resumed.train(resume_from_checkpoint=str(folder))
    exactly_equal(parameters(resumed.model), parameters(whole.model))
    shard = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][WEIGHT]
    (folder / shard).unlink()
    with pytest.raises(ValueError, match=shard):
        trainer(tmp_path, **ROTATIONAL).train(resume_from_checkpoint=str(folder))


def test_an_optimizer_made_before_standardizing_is_refused(tmp_path: Path) -> None:
    refused = trainer(tmp_path, **STANDARDIZED)
    refused.optimizer = torch.optim.SGD(refused.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="weight_standardization: 'function_preserving' with an optimizer that was"):
        refused.train()


class SaysWhereItBegins(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"begins at step {state.global_step}")


def train_in_two_processes(folder: str) -> None:
    """Trains whole and resumed runs on every rank, and compares them on each."""
    killed = Path(folder, "killed")
    trainer(killed, **ROTATIONAL).train()
    last = checkpoint(killed, STEPS) / "rng_state_1.pth"
    if torch.distributed.get_rank() == 1:
        last.write_bytes(last.read_bytes()[:-100])
    torch.distributed.barrier()
    resumed = trainer(killed, **ROTATIONAL)
    resumed.add_callback(SaysWhereItBegins())
    resumed.train(resume_from_checkpoint=True)
    for name, settings in (("mixtral", ROTATIONAL), ("vit", STANDARDIZED)):
        whole = trainer(Path(folder, name), name, **settings)
        whole.train()
        resumed = trainer(Path(folder, name), name, **settings)
        resumed.train(resume_from_checkpoint=str(checkpoint(Path(folder, name))))
        exactly_equal(parameters(resumed.model), parameters(whole.model))
        print(f"{name} on {resumed.args.world_size} processes: resumed exactly")


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.18"),
    reason="before 5.18 transformers resumes no run of several processes on CPUs, with any optimizer",
)
def test_in_two_processes_too(tmp_path: Path) -> None:
    printed = launch(__file__, 2, str(tmp_path))
    assert printed.count(f"begins at step {SAVED}") == 2  # the last checkpoint is damaged for one of them
    for name in ("mixtral", "vit"):
        assert printed.count(f"{name} on 2 processes: resumed exactly") == 2


if __name__ == "__main__":
    train_in_two_processes(sys.argv[1])
    leave()
