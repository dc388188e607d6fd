"""What Trainers push, by argument and by method, ours and stock ones that are patched."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetInfo
from huggingface_hub import ModelCard
from transformers import Trainer
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import trainer_patches
from hf_rotational import RotationalTrainer
from hf_rotational.cli import main
from hf_rotational.errors import UserError
from tests.hub.loopback import TOKEN, Hub
from tests.hub.runs import assert_publishable, trainer

MODEL = {
    *("README.md", "rotation.png", "rotation.jsonl", "trainer_state.json", "training_args.json"),
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}
RESUMED = {
    *("trainer_state.json", "training_args.json", "config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
}


@pytest.fixture
def patched() -> Iterator[None]:
    with trainer_patches.patched():
        yield


def card_of(hub: Hub, name: str = "alice/tiny") -> ModelCard:
    return ModelCard(hub.repositories[name].files["README.md"].decode())


def trained(output_dir: Path, cls: type[Trainer] = RotationalTrainer, **settings: Any) -> Any:
    """A trainer that has trained with ``push_to_hub``, and waited for what it pushes meanwhile."""
    made = trainer(output_dir, cls, push_to_hub=True, hub_model_id="alice/tiny", **settings)
    made.train()
    return made


@pytest.mark.parametrize("cls", [RotationalTrainer, Trainer])
@pytest.mark.usefixtures("patched")
def test_the_end_of_training_is_pushed(hub: Hub, tmp_path: Path, cls: type[Trainer]) -> None:
    out = tmp_path / "out"
    done = trained(out, cls, hub_strategy="end")
    repository = hub.repositories["alice/tiny"]
    assert repository.commits == []
    commit = done.push_to_hub(tags="mine")
    assert commit.commit_url.startswith(f"{hub.url}/alice/tiny/commit/")
    assert repository.commits == ["End of training"]
    assert set(repository.files) == MODEL
    assert repository.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert_publishable(repository, out)
    card = card_of(hub)
    card.validate()
    assert {"mine", "generated_from_trainer", "rotational-equilibrium"} <= set(card.data.tags)
    (accuracy,) = (result for result in card.data.eval_results if result.metric_type == "accuracy")
    assert accuracy.task_type == "text-classification"
    assert card.data.datasets is None  # the Trainer would write "None", which read them
    assert "None" not in card.text
    evaluation = next(entry for entry in reversed(done.state.log_history) if "eval_accuracy" in entry)
    assert accuracy.metric_value == round(evaluation["eval_accuracy"], 4)
    rotating = {name for name, _ in done.model.named_parameters() if "encoder" in name and "weight" in name}
    assert f"{len([name for name in rotating if 'LayerNorm' not in name])} of 25 tensors rotate" in card.text
    for said in ("### Training hyperparameters", "## Use", "## Rotational training", "](rotation.png)"):
        assert card.text.count(said) == 1


@pytest.mark.parametrize(
    ("strategy", "files"),
    [
        ("every_save", MODEL),
        ("checkpoint", MODEL | {f"last-checkpoint/{name}" for name in RESUMED}),
    ],
)
def test_checkpoints_are_pushed_while_training(hub: Hub, tmp_path: Path, strategy: str, files: set[str]) -> None:
    out = tmp_path / "out"
    # With a limit of one, the first is removed when the second is saved.
    trained(out, hub_strategy=strategy, hub_always_push=True, save_total_limit=1, load_best_model_at_end=False)
    repository = hub.repositories["alice/tiny"]
    assert repository.commits == ["Training in progress, step 3", "Training in progress, step 6"]
    assert set(repository.files) == files
    assert repository.files["model.safetensors"] == (out / "checkpoint-6" / "model.safetensors").read_bytes()
    assert "## Rotational training" in card_of(hub).text
    assert_publishable(repository, out)
    assert not list(out.glob("_push*"))


def test_a_run_resumes_exactly_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    trained(tmp_path / "out", hub_strategy="all_checkpoints", hub_always_push=True, load_best_model_at_end=False)
    repository = hub.repositories["alice/tiny"]
    assert set(repository.files) == MODEL | {f"checkpoint-{step}/{name}" for step in (3, 6) for name in RESUMED}
    assert_publishable(repository, tmp_path / "out")
    checkpoint = tmp_path / "elsewhere" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    for name, content in repository.files.items():
        if name.startswith("checkpoint-3/"):
            (tmp_path / "elsewhere" / name).write_bytes(content)
    resumed = trainer(tmp_path / "elsewhere", load_best_model_at_end=False)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.save_model()
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == repository.files["model.safetensors"]


def test_other_ranks_leave_it_to_the_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotationalTrainer, "is_world_process_zero", lambda self: False)
    done = trained(tmp_path, hub_strategy="every_save")
    assert done.push_to_hub() is None
    assert (tmp_path / "model.safetensors").is_file()  # saving may take all of them
    assert not (tmp_path / "README.md").exists()
    assert hub.repositories == {}


def test_saving_by_hand_pushes(hub: Hub, tmp_path: Path) -> None:
    trained(tmp_path / "out", hub_strategy="end").save_model()
    assert hub.repositories["alice/tiny"].commits == ["Model save"]


def test_the_method_alone_creates_a_private_repository_in_the_background(hub: Hub, tmp_path: Path) -> None:
    done = trainer(tmp_path / "my-run")
    done.train()
    job = done.push_to_hub(private=True, blocking=False, commit_message="Mine")
    assert isinstance(job, Future)
    job.result()
    assert hub.repositories["alice/my-run"].private
    assert hub.repositories["alice/my-run"].commits == ["Mine"]
    assert set(hub.repositories["alice/my-run"].files) == MODEL
    assert not list((tmp_path / "my-run").glob("_push*"))


def test_what_a_script_says_of_its_data_and_model_is_on_the_card(hub: Hub, tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"  # as --model_name_or_path would have it, and gone since
    trained(tmp_path / "out", hub_strategy="end").push_to_hub(
        finetuned_from=str(base),
        tasks="text-classification",
        language="en",
        dataset_tags="glue",
        dataset="GLUE SST2",
        dataset_args="sst2",
    )
    card = card_of(hub)
    assert card.data.base_model is None
    assert (card.data.language, card.data.datasets) == (["en"], ["glue"])
    assert {result.dataset_name for result in card.data.eval_results} == {"GLUE SST2"}
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy", "loss"}
    assert "fine-tuned version of `base`" in card.text
    assert_publishable(hub.repositories["alice/tiny"], tmp_path / "out")


def test_models_and_data_from_the_hub_are_named(hub: Hub, tmp_path: Path) -> None:
    made = trainer(tmp_path / "out", push_to_hub=True, hub_model_id="alice/tiny", hub_strategy="end")
    made.model.config._name_or_path = "owner/base"
    files = {"hf://datasets/owner/data@0123abc/train.csv": {"num_bytes": 1, "checksum": None}}
    made.train_dataset.info.update(DatasetInfo(download_checksums=files))
    made.train()
    made.push_to_hub()
    assert (card_of(hub).data.base_model, card_of(hub).data.datasets) == ("owner/base", ["owner/data"])
    (tmp_path / "out" / "README.md").unlink()
    main(["push", str(tmp_path / "out"), "alice/later"])  # it is in the run's records
    later = card_of(hub, "alice/later").data
    assert (later.base_model, later.datasets) == ("owner/base", ["owner/data"])


def test_without_a_monitor_the_card_says_what_the_optimizer_knows(hub: Hub, tmp_path: Path) -> None:
    trained(tmp_path / "out", hub_strategy="end", rotation_logging_steps=0, rotation="0.002").push_to_hub()
    text = card_of(hub).text
    assert "the angle was 2.00e-03 rad" in text
    assert "tensors rotate" in text
    assert "| target angle | 0.002 rad per step |" in text


@pytest.mark.parametrize("cls", [RotationalTrainer, Trainer])
@pytest.mark.usefixtures("patched")
def test_what_an_earlier_run_measured_is_not_published(hub: Hub, tmp_path: Path, cls: type[Trainer]) -> None:
    trainer(tmp_path, cls).train()
    resumed = trainer(tmp_path, cls, rotation_logging_steps=0, hub_model_id="alice/resumed")
    resumed.train(resume_from_checkpoint=True)
    resumed.push_to_hub()
    assert set(hub.repositories["alice/resumed"].files) == MODEL  # the same run
    anew = trainer(tmp_path, cls, rotation_logging_steps=0, hub_model_id="alice/anew")
    anew.train()
    anew.push_to_hub()
    assert set(hub.repositories["alice/anew"].files) == MODEL - {"rotation.jsonl"}


def test_a_run_that_does_not_rotate_is_not_said_to(hub: Hub, tmp_path: Path) -> None:
    trained(tmp_path / "out", hub_strategy="end", optim="adamw_torch").push_to_hub()
    card = card_of(hub)
    assert card.data.tags == ["generated_from_trainer"]
    assert "Rotational training" not in card.text
    assert_publishable(hub.repositories["alice/tiny"], tmp_path / "out")


MINE = "---\nlicense: mit\n---\n# Mine\n\nAs I wrote it.\n"


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_a_card_that_somebody_wrote_is_kept(hub: Hub, tmp_path: Path, strategy: str) -> None:
    (tmp_path / "README.md").write_text(MINE)
    trained(tmp_path, hub_strategy=strategy).push_to_hub()
    assert card_of(hub).content.endswith("\n---\n# Mine\n\nAs I wrote it.\n")
    assert card_of(hub).data.license == "mit"
    assert "rotational-equilibrium" in card_of(hub).data.tags


def test_a_card_is_kept_without_training(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(MINE)
    trainer(tmp_path, push_to_hub=True, hub_model_id="alice/tiny").push_to_hub()
    assert card_of(hub).content.endswith("\n---\n# Mine\n\nAs I wrote it.\n")


class OtherCards(Trainer):
    """Writes cards as trl's trainers do: of its own form, with other arguments, at every checkpoint too."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None
    ) -> None:
        front = f"---\ntags: [sft, 'base:/data/models/base']\ndatasets: {dataset_name}\n---\n"
        Path(self.args.output_dir, "README.md").write_text(f"{front}\n# Model Card for {model_name}\n\nOurs.")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.create_model_card(model_name="tiny")
        super()._save_checkpoint(*args, **kwargs)


class MixedIn(RotationalTrainer, OtherCards):
    pass


@pytest.mark.parametrize("cls", [MixedIn, OtherCards])
@pytest.mark.parametrize("mine", [None, MINE])
@pytest.mark.usefixtures("patched")
def test_cards_of_other_trainers_are_completed(hub: Hub, tmp_path: Path, cls: type[Trainer], mine: str | None) -> None:
    if mine:
        (tmp_path / "README.md").write_text(mine)
    trained(tmp_path, cls, hub_strategy="every_save").push_to_hub(dataset_name="owner/data")
    card = card_of(hub)
    assert "rotational-equilibrium" in card.data.tags
    if mine:
        assert card.content.endswith("\n---\n# Mine\n\nAs I wrote it.\n")
    else:
        assert card.data.datasets == ["owner/data"]
        assert card.data.tags == ["sft", "base:base", "rotational-equilibrium"]
        assert "# tiny\n\nOurs.\n" in card.text
        assert card.text.count("## Rotational training") == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"hub_token": None}, "there is no token"),
        ({"hub_token": "hf_wrong"}, "the token was not accepted"),
        ({"hub_model_id": "bob/tiny"}, "the token has no right to write there"),
    ],
)
def test_who_may_not_push_is_told_before_training(
    hub: Hub, tmp_path: Path, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=reason) as refusal:
        trainer(tmp_path, **{"push_to_hub": True, "hub_model_id": "alice/tiny", **settings})
    assert "hf-rotational push" not in str(refusal.value)  # there is nothing to push yet


def test_who_may_not_push_after_training_has_the_model_and_the_command(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    done = trainer(tmp_path / "tiny", hub_token=None)
    done.train()
    with pytest.raises(UserError, match="there is no token") as refusal:
        done.push_to_hub()
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    main(str(refusal.value).rpartition("hf-rotational ")[2].split())
    assert set(hub.repositories["alice/tiny"].files) == MODEL


def test_a_connection_that_is_lost_at_the_end(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = trained(tmp_path / "out", hub_strategy="end", hub_private_repo=True)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's attempts
    hub.lose_commits = True
    with pytest.raises(UserError, match="The run is in") as loss:
        done.push_to_hub()
    repository = hub.repositories["alice/tiny"]
    assert repository.files == {}
    hub.lose_commits = False
    command = str(loss.value).rpartition("hf-rotational ")[2].split()
    assert command == ["push", str(tmp_path / "out"), "alice/tiny", "--private"]
    main(command)
    assert set(repository.files) == MODEL
    assert repository.files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_training_goes_on_where_a_checkpoint_cannot_be_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    out = tmp_path / "out"
    hub.lose_commits = True
    with CaptureLogger(logging.get_logger("transformers.hf_rotational.hub.push")) as warned:
        done = trained(out, hub_strategy="every_save", hub_always_push=True)
    assert done.state.global_step == 6
    for step in (3, 6):
        assert f"hf-rotational push {out}/checkpoint-{step} alice/tiny" in warned.out
    assert TOKEN not in warned.out
    hub.lose_commits = False
    (out / "vocab.txt").symlink_to(Path(__file__))  # found before anything is sent
    with CaptureLogger(logging.get_logger("transformers.hf_rotational.hub.trainer")) as warned:
        (out / "checkpoint-6" / "vocab.txt").symlink_to(Path(__file__))
        done._push_from_checkpoint(str(out / "checkpoint-6"))
    assert "link to a file outside" in warned.out
    assert hub.repositories["alice/tiny"].files == {}


def test_a_deleted_trainer_is_gone_at_once(tmp_path: Path) -> None:
    done = trainer(tmp_path)
    gc.collect()
    gc.disable()
    try:
        done.train()
        reference = weakref.ref(done)
        del done
        assert reference() is None
    finally:
        gc.enable()
