"""Unmodified scripts, run the way users run them: in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_rotational.monitor.records import read_records

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
RUNNER = ["-m", "trainer_patches"]
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

RUN_COMMAND = ["-c", "from hf_rotational.cli import main; main()", "run"]

OPTIONS = {"optim": "rotational_adamw", "rotation": "match", "rotation_centering": "updates"}
SENTENCE = "the weights of a neuron turn by one angle per step and keep their norm"


@dataclass(frozen=True)
class Workspace:
    """A tiny model, a tiny corpus, and somewhere to train."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def arguments(self, output: str, **overrides: object) -> dict[str, object]:
        return {
            "model_name_or_path": str(self.model),
            "train_file": "train.txt",  # relative to the working directory, as users write it
            "validation_file": "validation.txt",
            "preprocessing_num_workers": 2,
            "dataloader_num_workers": 1,
            "output_dir": output,
            "do_train": True,
            "do_eval": True,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "seed": 1,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            **overrides,
        }

    def python(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(self.folder / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # the same order of summation in every run
        }
        return subprocess.run(
            [sys.executable, *command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )

    def run(self, *launcher: str, output: str, **overrides: object) -> subprocess.CompletedProcess[str]:
        """Run the training script."""
        arguments = self.arguments(output, **overrides)
        flags = [part for key, value in arguments.items() for part in (f"--{key}", str(value))]
        return self.python(*launcher, str(SCRIPTS / "clm_style.py"), *flags)

    def train(self, *launcher: str, output: str, **overrides: object) -> Path:
        """Run the training script and return the folder it wrote."""
        return self.finished(self.run(*launcher, output=output, **overrides), output)

    def train_from_json(self, *launcher: str, output: str, **overrides: object) -> Path:
        """The same, with all arguments in a JSON file."""
        (self.folder / f"{output}.json").write_text(json.dumps(self.arguments(output, **overrides)))
        return self.finished(self.python(*launcher, str(SCRIPTS / "clm_style.py"), f"{output}.json"), output)

    def finished(self, process: subprocess.CompletedProcess[str], output: str) -> Path:
        assert process.returncode == 0, process.stderr[-4000:]
        return self.folder / output


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    space = Workspace(tmp_path_factory.mktemp("scripts"))
    vocabulary = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(SENTENCE.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(space.model)

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(space.model)

    (space.folder / "train.txt").write_text("".join(SENTENCE[i % 5 * 4 :] + "\n" for i in range(80)))
    (space.folder / "validation.txt").write_text((SENTENCE + "\n") * 4)
    return space


@pytest.fixture(scope="module")
def rotational(workspace) -> Path:
    return workspace.train(*RUNNER, output="rotational", **OPTIONS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changes_of_neuron_norms(before: Path, after: Path) -> torch.Tensor:
    """Relative change of each neuron's norm, over the matrices of GPT-2, which hold a neuron per column."""
    old, new = weights(before), weights(after)
    names = [name for name, weight in old.items() if ".h." in name and weight.ndim == 2]
    assert len(names) == 2 * 4
    assert all((old[name] - new[name]).abs().max() > 1e-3 for name in names), "training moved nothing"
    return torch.cat([(new[name].norm(dim=0) / old[name].norm(dim=0) - 1).abs() for name in names])


def test_the_rotational_optimizer_trains(workspace, rotational):
    assert changes_of_neuron_norms(workspace.model, rotational).max() < 1e-5
    results = json.loads((rotational / "all_results.json").read_text())
    assert results["train_loss"] > results["eval_loss"]


def test_the_saved_model_is_plain(rotational):
    model, info = AutoModelForCausalLM.from_pretrained(rotational, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model) is GPT2LMHeadModel


def test_the_saved_arguments_load_where_this_package_is_not_there(rotational):
    args = torch.load(rotational / "training_args.bin", weights_only=False)
    assert type(args.optim) is str
    assert {name: getattr(args, name) for name in OPTIONS} == OPTIONS
    with zipfile.ZipFile(rotational / "training_args.bin") as archive:
        (pickled,) = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    assert b"transformers.training_args" in pickled
    assert b"hf_rotational" not in pickled
    assert b"trainer_patches" not in pickled


def test_rotation_is_measured(rotational):
    assert read_records(rotational).steps[0]["rotation"] > 0


def test_arguments_from_json_and_optim_args_which_win(workspace, rotational):
    options = OPTIONS | {"rotation": 0.5, "optim_args": "rotation=match"}
    again = workspace.train_from_json(*RUN_COMMAND, output="from_json", **options)
    torch.testing.assert_close(weights(again), weights(rotational), rtol=0, atol=0)


def test_two_processes(workspace):
    trained = workspace.train(*TWO_PROCESSES, *RUNNER, output="two_processes", **OPTIONS)
    assert changes_of_neuron_norms(workspace.model, trained).max() < 1e-5


def test_without_the_flag_nothing_changes(workspace):
    alone = workspace.train(output="alone", optim="adamw_torch")
    patched = workspace.train(*RUNNER, output="patched", optim="adamw_torch")
    torch.testing.assert_close(weights(patched), weights(alone), rtol=0, atol=0)
    assert changes_of_neuron_norms(workspace.model, patched).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optim_args": "spin=fast"}, ["'spin'", "rotation", "centering", "granularity"]),
        ({"optim": "adamw_torch"}, ["--rotation, --rotation_centering would do nothing with --optim adamw_torch"]),
    ],
)
def test_options_that_cannot_be_used_end_the_script(workspace, options, words):
    process = workspace.run(*RUNNER, output="refused", **OPTIONS | options)
    assert process.returncode == 2
    last_line = process.stderr.strip().splitlines()[-1]
    assert last_line.startswith("trainer_patches: ")
    assert all(word in last_line for word in words)


def test_the_help_of_the_script_lists_the_arguments(workspace):
    process = workspace.python(*RUN_COMMAND, str(SCRIPTS / "clm_style.py"), "--help")
    assert process.returncode == 0
    for name in (*OPTIONS, "rotation_exclude", "rotation_logging_steps", "weight_standardization", "block_size"):
        assert f"--{name} " in process.stdout


@pytest.fixture(scope="module")
def seq2seq(workspace) -> dict[str, object]:
    """Arguments of a script with subclasses of its own; standardized, with a stock optimizer, and monitored."""
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=30, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(workspace.folder / "t5")
    return {
        "model_name_or_path": "t5",
        "max_steps": 4,
        "save_steps": 2,
        "number_of_rows": 20,
        "learning_rate": 1e-2,
        "optim": "adamw_torch",
        "weight_standardization": "drop_mean",
        "rotation_logging_steps": 2,
        "predict_with_generate": True,
        "use_cpu": True,
        "report_to": "none",
    }


def test_a_script_with_classes_of_its_own_is_standardized_monitored_and_resumed(workspace, seq2seq):
    def run(output: str, **more: object) -> Path:
        arguments = seq2seq | {"output_dir": output} | more
        (workspace.folder / f"{output}.yaml").write_text(json.dumps(arguments))  # is YAML too
        return workspace.finished(
            workspace.python(*RUNNER, str(SCRIPTS / "seq2seq_style.py"), f"{output}.yaml"), output
        )

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint="whole/checkpoint-2")
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert weights(whole).keys() == weights(workspace.folder / "t5").keys()
    assert [record["step"] for record in read_records(whole).steps] == [1, 3]
    assert {path.name for path in whole.glob("**/_rotational*")} == {"_rotational_weights.safetensors"}
    neuron = weights(whole)["encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert neuron.mean(dim=1).abs().max() < 1e-6 < neuron.std()


def test_processes_started_afresh_find_the_script(workspace):
    process = workspace.python(*RUNNER, str(SCRIPTS / "spawning.py"))
    assert (process.returncode, process.stdout) == (0, "[0, 2, 4, 6]\n"), process.stderr
