"""``hf-rotational push``: finished runs, and everything that can be wrong with them or on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_rotational import RotationalTrainingArguments
from hf_rotational.cli import main
from hf_rotational.hub import readme
from hf_rotational.monitor.plots import plot_runs
from tests.hub.loopback import TOKEN, Hub, Repository
from tests.hub.runs import assert_publishable, finished_run

EXPECTED = {
    *("README.md", "rotation.png", "rotation.jsonl", "trainer_state.json", "training_args.json"),
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
}


def push(*arguments: object) -> None:
    main(["push", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that says why a push cannot be."""
    with pytest.raises(SystemExit) as ending:
        push(*arguments)
    assert ending.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    return line.removeprefix("hf-rotational: error: ")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")


def test_a_finished_run(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(run, "alice/tiny")
    assert capsys.readouterr().out == f"{hub.url}/alice/tiny\n"
    repository = hub.repositories["alice/tiny"]
    assert set(repository.files) == EXPECTED
    assert repository.commits == ["Upload a run"]
    assert repository.files["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert json.loads(repository.files["training_args.json"])["optim"] == "rotational_adamw"
    assert json.loads(repository.files["trainer_state.json"])["best_model_checkpoint"] == "checkpoint-60"
    assert_publishable(repository, run)
    assert not list(run.glob("_push*"))


def test_its_card(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "plot_runs", plot_runs)
    push(run, "alice/tiny")
    assert hub.repositories["alice/tiny"].files["rotation.png"].startswith(b"\x89PNG")
    card = ModelCard(hub.repositories["alice/tiny"].files["README.md"].decode())
    card.validate()
    assert card.content == (run / "README.md").read_text(encoding="utf-8")
    data = card.data.to_dict()
    (model,) = data.pop("model-index")
    assert data == {
        "base_model": "owner/base",
        "datasets": ["owner/data"],
        "library_name": "transformers",
        "metrics": ["accuracy", "loss"],
        "tags": ["rotational-equilibrium"],
    }
    (result,) = model["results"]
    assert result["task"]["type"] == "text-classification"
    assert result["dataset"] == {"name": "owner/data", "type": "owner/data"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [("loss", 2.125), ("accuracy", 0.75)]
    assert (
        "from transformers import AutoTokenizer, BertForSequenceClassification\n"
        'tokenizer = AutoTokenizer.from_pretrained("alice/tiny")\n'
        'model = BertForSequenceClassification.from_pretrained("alice/tiny")\n' in card.text
    )
    for said in (
        "[owner/base](https://huggingface.co/owner/base), fine-tuned on",
        "8 of 11 tensors rotate: 10 of 20 parameters (50.0%). These are `model.layers.*.self_attn.q_proj.weight`, ",
        "| optimizer | RotationalAdamW |\n| optim | `rotational_adamw` |",
        "| target angle | `equilibrium`",
        "| learning rate | 0.001, linear schedule, no warmup |",
        "| rotation / target | 1.00 |",
        "](rotation.png)",
    ):
        assert said in card.text


def test_an_owner_is_not_needed_and_a_repository_may_exist(hub: Hub, run: Path) -> None:
    hub.repositories["alice/tiny"] = Repository(private=False, files={"theirs": b"", "README.md": b"old"})
    push(run, "tiny", "--message", "Again")
    assert hub.repositories["alice/tiny"].commits == ["Again"]
    assert set(hub.repositories["alice/tiny"].files) == {*EXPECTED, "theirs"}


def test_private_repositories(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push(run, "alice/secret", "--private")
    push(run, "alice/secret", "--private")  # which exists now
    assert hub.repositories["alice/secret"].private
    hub.repositories["alice/public"] = Repository(private=False)
    capsys.readouterr()
    assert "public repository alice/public already" in refusal(capsys, run, "alice/public", "--private")
    assert hub.repositories["alice/public"].files == {}


def test_tokens(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    again = f". The run is in {run}; to push it: hf-rotational push {run} alice/tiny"
    failed = f"alice/tiny cannot be pushed to {hub.url}: "
    assert refusal(capsys, run, "alice/tiny") == f"{failed}there is no token (hf auth login, or HF_TOKEN){again}"
    wrong = refusal(capsys, run, "alice/tiny", "--token", "hf_wrong")
    assert wrong == f"{failed}the token was not accepted (hf auth login, or HF_TOKEN){again}"
    assert "hf_wrong" not in wrong
    assert refusal(capsys, run, "bob/tiny", "--token", TOKEN, "--private") == (
        f"bob/tiny cannot be pushed to {hub.url}: the token has no right to write there. The run is in {run}; "
        f"to push it: hf-rotational push {run} bob/tiny --private"
    )
    assert hub.repositories == {}
    push(run, "alice/tiny", "--token", TOKEN)
    assert_publishable(hub.repositories["alice/tiny"], run)


def test_a_connection_that_is_lost(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's attempts
    hub.lose_commits = True
    line = refusal(capsys, run, "alice/tiny").splitlines()[-1]
    assert line.endswith(f"to push it: hf-rotational push {run} alice/tiny")
    assert hub.repositories["alice/tiny"].files == {}
    assert not list(run.glob("_push*"))
    hub.lose_commits = False
    push(*line.rpartition("hf-rotational push ")[2].split())
    assert set(hub.repositories["alice/tiny"].files) == EXPECTED


@pytest.mark.parametrize("name", ["a/b/c", "with space/x", "-x/y"])
def test_names_that_cannot_be(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert f"{name} cannot be pushed" in refusal(capsys, run, "--", name)


def test_what_is_no_run(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "absent", "alice/tiny") == "RUN_DIR absent: no such directory"
    assert "holds no weights" in refusal(capsys, tmp_path, "alice/tiny")
    assert hub.repositories == {}


def test_a_run_of_which_little_is_known(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rotation.jsonl", "trainer_state.json", "training_args.bin", "tokenizer_config.json"):
        (run / name).unlink()
    push(run, "alice/tiny")
    card = ModelCard(hub.repositories["alice/tiny"].files["README.md"].decode())
    assert card.data.to_dict() == {"library_name": "transformers"}
    warnings = capsys.readouterr().err.splitlines()
    assert [warning.partition(" does not exist")[0] for warning in warnings] == [
        f"hf-rotational: warning: {run / name}" for name in ("rotation.jsonl", "trainer_state.json")
    ]
    assert "from transformers import BertForSequenceClassification\nmodel = " in card.text
    assert "rotation.png" not in card.text
    assert_publishable(hub.repositories["alice/tiny"], run)


def test_a_checkpoint(hub: Hub, run: Path) -> None:
    checkpoint = run / "checkpoint-30"
    checkpoint.mkdir()
    for name in ("model.safetensors", "config.json"):
        (run / name).rename(checkpoint / name)
    history = [{"step": step, "loss": 2.5} for step in range(1, 31)]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    push(checkpoint, "alice/tiny")
    repository = hub.repositories["alice/tiny"]
    assert "| measured steps | 3, up to step 21 |" in repository.files["README.md"].decode()
    assert "rotation.png" in repository.files
    lines = [json.loads(line) for line in repository.files["rotation.jsonl"].decode().splitlines()]
    assert [line["step"] for line in lines[1:]] == [1, 11, 21]


def test_the_best_checkpoint_is_published_with_its_own_evaluation(hub: Hub, run: Path) -> None:
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"] += [
        {"step": 30, "eval_loss": 1.5, "eval_runtime": 1.0},
        {"step": 60, "eval_loss": 2.5, "eval_runtime": 1.0},
        {"step": 60, "train_runtime": 1.0, "train_loss": 2.0},
    ]
    state["best_global_step"] = 30
    (run / "trainer_state.json").write_text(json.dumps(state))

    def losses(name: str) -> list[float]:
        push(run, f"alice/{name}")
        card = ModelCard(hub.repositories[f"alice/{name}"].files["README.md"].decode())
        return [result.metric_value for result in card.data.eval_results if result.metric_type == "loss"]

    assert losses("last") == [2.5]
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    torch.save(RotationalTrainingArguments(str(run), use_cpu=True, **best), run / "training_args.bin")
    assert losses("best") == [1.5]
    state["log_history"].append({"step": 60, "eval_loss": 1.25})  # of the published model
    (run / "trainer_state.json").write_text(json.dumps(state))
    assert losses("evaluated") == [1.25]


MINE = "---\nlicense: mit  # mine\ntags: [mine]\n---\n# Mine\n\nAs I wrote it.\n"


def test_a_card_that_somebody_wrote_is_kept(hub: Hub, run: Path) -> None:
    (run / "README.md").write_text(MINE)
    push(run, "alice/tiny")
    published = hub.repositories["alice/tiny"].files["README.md"].decode()
    assert published.endswith("---\n# Mine\n\nAs I wrote it.\n")
    data = ModelCard(published).data
    assert (data.license, data.tags) == ("mit", ["mine", "rotational-equilibrium"])
    assert (data.base_model, data.datasets, data.metrics) == ("owner/base", ["owner/data"], ["accuracy", "loss"])
    assert_publishable(hub.repositories["alice/tiny"], run)


def test_a_card_to_which_nothing_is_to_be_added_is_not_touched(hub: Hub, run: Path) -> None:
    push(run, "alice/tiny")
    front = (run / "README.md").read_text().partition("\n---\n")[0]
    mine = f"{front}\n# a comment of mine\n---\n# Mine\n"
    (run / "README.md").write_text(mine)
    push(run, "alice/tiny")
    assert hub.repositories["alice/tiny"].files["README.md"].decode() == mine


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ("---\na: [\n---\n# Mine", "README.md has metadata that cannot be read"),
        ("---\nmodel-index: [{name: x}]\n---\n# Mine", "README.md has metadata that cannot be read"),
        ("---\ntags: [1]\n---\n# Mine", "tags"),
        (f"# Mine\n{TOKEN}", "README.md holds an access token"),
        ("# Mine\nhf_" + "abcdefgh" * 4, "README.md holds an access token"),
    ],
)
def test_cards_that_cannot_be_published(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], card: str, reason: str
) -> None:
    (run / "README.md").write_text(card)
    assert reason in refusal(capsys, run, "alice/tiny").splitlines()[-1]
    assert hub.repositories["alice/tiny"].files == {}


def test_a_card_that_names_a_folder(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "README.md").write_text(f"# Mine\nin {run}/x")
    assert f"README.md names a folder of this machine, {run} (remove it)" in refusal(capsys, run, "alice/tiny")


def test_a_card_that_lies_elsewhere(hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(MINE)
    (run / "README.md").symlink_to(tmp_path / "README.md")
    assert "README.md is a link to a file outside" in refusal(capsys, run, "alice/tiny")
    assert (tmp_path / "README.md").read_text() == MINE


LOAD = """
import sys
sys.modules["hf_rotational"] = sys.modules["trainer_patches"] = None  # any import of them fails
from safetensors.torch import save_file
{usage}
save_file(model.state_dict(), "loaded.safetensors")
assert tokenizer("w3")["input_ids"] == [3]
"""


def test_a_process_that_has_never_heard_of_us_loads_it_bit_for_bit(hub: Hub, run: Path, tmp_path: Path) -> None:
    push(run, "alice/tiny", "--private")
    usage = (run / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", LOAD.format(usage=usage)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saved, loaded = load_file(run / "model.safetensors"), load_file(tmp_path / "loaded.safetensors")
    assert saved.keys() <= loaded.keys()
    assert all(saved[name].equal(loaded[name]) for name in saved)
