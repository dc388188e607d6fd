"""The config files of examples/accelerate: Accelerate reads them, and what they say is what a Trainer does.

Run as a script, this file is the training script that they launch, here on CPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_rotational import RotationalTrainer, RotationalTrainingArguments
from tests.distributed.ranks import leave

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))}
RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"type": "MULTI_CPU", "computes in": "torch.float32", "precision": "no", "sharded": False},
    "bf16": {"type": "MULTI_CPU", "computes in": "torch.bfloat16", "precision": "bf16", "sharded": False},
    "fsdp2": {"type": "FSDP", "computes in": "torch.bfloat16", "precision": "bf16", "sharded": True},
    "deepspeed_zero0": {"type": "DEEPSPEED", "computes in": "torch.float32", "precision": "no", "sharded": False},
}
"""Config to what a run has seen; float16 takes a GPU."""
BATCH = 8


def train(folder: Path, fully_sharded: bool) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What kind of run it is, and its weights."""
    set_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=40,
    )
    model = LlamaForCausalLM(config)
    rows = [[(7 * row + column**2) % 40 for column in range(6)] for row in range(64)]
    args = RotationalTrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        max_steps=6,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    if fully_sharded:  # Accelerate shards nothing on CPUs, without a word, unless it takes them for GPUs
        _ = args.device
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = RotationalTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows})
    )
    seen: dict[str, Any] = {}
    layer = model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.update({"computes in": str(output.dtype)}))
    trainer.train()
    trained = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    state = trainer.accelerator.state
    seen |= {"type": state.distributed_type.value, "precision": state.mixed_precision}
    seen["sharded"] = all(isinstance(parameter, DTensor) for parameter in trained)
    return seen, [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in trained]


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_the_config(name: str) -> None:
    config = load_config_from_file(str(CONFIGS[name]))  # raises for keys it does not know
    assert config.num_processes == 2
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) in vars(DistributedType)
    options = {action.dest for action in launch_command_parser()._actions}
    nested = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert nested.keys() <= options


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_says_how_to_use_it(name: str) -> None:
    assert f"accelerate launch --config_file examples/accelerate/{name}.yaml" in CONFIGS[name].read_text()


# fsdp2 computes in bfloat16 too.
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n == "bf16" else ()) for n in RUNS])
def test_the_launched_run_is_what_the_config_says(name: str, tmp_path: Path) -> None:
    if "deepspeed" in name and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS[name])]
    result = subprocess.run(
        [*launcher, "--main_process_port", "0", __file__, str(tmp_path), *(["fsdp"] if name == "fsdp2" else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "seen.json").read_text()) == RUNS[name]
    if RUNS[name]["precision"] == "no":
        _, alone = train(tmp_path / "alone", fully_sharded=False)
        # Sums over ranks are rounded in another order: 6e-8 a step, of weights up to 0.1.
        torch.testing.assert_close(torch.load(tmp_path / "weights.pt"), alone, rtol=0.0, atol=1e-6)


if __name__ == "__main__":
    found, weights = train(Path(sys.argv[1]), fully_sharded="fsdp" in sys.argv)
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "seen.json").write_text(json.dumps(found))
        torch.save(weights, Path(sys.argv[1], "weights.pt"))
    leave()
