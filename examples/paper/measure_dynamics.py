"""The paper's first figure: weight decay brings AdamW's neurons to a steady norm and a steady angle per step.

Trains a small GPT-2 on the source of Python's standard library and a small ViT on scikit-learn's handwritten digits,
each with AdamW and with RotationalAdamW at the same constant learning rate and weight decay, and measures every layer.
AdamW turns ten times too fast at first, then its norms and angles move towards the dashed predictions of
``hf_rotational.equilibrium``; layers that no normalization follows stay off them, since the scale of their neurons
matters. The rotational optimizer is on the line of the angle from the first step, at the norms it started with.

    python examples/paper/measure_dynamics.py   # about 5 minutes on 2 cores; draws docs/figures/measure_dynamics.png
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from hf_rotational import RotationalTrainer, RotationalTrainingArguments, equilibrium
from hf_rotational.monitor.records import RunRecords, read_records

LEARNING_RATE, WEIGHT_DECAY, BETAS = 3e-3, 0.5, (0.9, 0.95)
EVERY = 5
COLORS = {"adamw_torch": "#7f7f7f", "rotational_adamw": "#1f6fb4"}
NAMES = {"adamw_torch": "AdamW", "rotational_adamw": "RotationalAdamW"}


def gpt2() -> tuple[PreTrainedModel, Dataset]:
    """A two-layer GPT-2 over bytes, and pieces of the standard library's modules of 128 bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))[: 128 * 8000]
    pieces = [list(text[start : start + 128]) for start in range(0, len(text) - 127, 128)]
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=256, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config), Dataset.from_dict({"input_ids": pieces, "labels": pieces})


def vit() -> tuple[PreTrainedModel, Dataset]:
    """A two-layer ViT over patches of 2x2 pixels, and 1,797 digits of 8x8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
    )
    dataset = Dataset.from_dict({"pixel_values": images.numpy(), "labels": digits.target})
    return ViTForImageClassification(config), dataset.with_format("torch")


def measure(build: Callable[[], tuple[PreTrainedModel, Dataset]], optim: str, steps: int) -> RunRecords:
    """Trains, and returns what the monitor wrote, a record every ``EVERY`` steps."""
    set_seed(0)
    model, dataset = build()
    with tempfile.TemporaryDirectory() as folder:
        args = RotationalTrainingArguments(
            output_dir=folder,
            optim=optim,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            lr_scheduler_type="constant",
            max_steps=steps,
            per_device_train_batch_size=16,
            logging_strategy="no",
            save_strategy="no",
            rotation_logging_steps=EVERY,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        RotationalTrainer(model=model, args=args, train_dataset=dataset, data_collator=default_data_collator).train()
        return read_records(folder)


def relative(run: RunRecords, quantity: str) -> dict[str, list[float]]:
    """For each layer its mean norm (``"norm"``) or angle (``"angle"``) over the prediction for AdamW, step by step."""
    series = {}
    for name, stored in run.header["parameters"].items():
        fan_in = math.prod(size for dim, size in enumerate(stored["shape"]) if dim not in stored["neuron_dims"])
        record = equilibrium.adamw(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fan_in=fan_in)
        predicted = {"norm": record.norm, "angle": record.rotation}[quantity]
        series[name] = [step["layers"][name][quantity][0] / predicted for step in run.steps]
    return series


def settled(series: dict[str, list[float]]) -> tuple[float, float, float]:
    """Smallest, median and largest layer, each averaged over the last quarter of the run."""
    means = [statistics.fmean(values[-len(values) // 4 :]) for values in series.values()]
    return min(means), statistics.median(means), max(means)


def draw(panel: Axes, runs: dict[str, RunRecords], quantity: str, title: str) -> None:
    """One line for each layer; the prediction is at 1."""
    for optim, run in runs.items():
        steps = [step["step"] for step in run.steps]
        for index, values in enumerate(relative(run, quantity).values()):
            panel.plot(steps, values, color=COLORS[optim], linewidth=0.9, label=NAMES[optim] if not index else None)
    panel.axhline(1.0, color="black", linestyle=(0, (4, 3)), linewidth=1.2, label="predicted")
    panel.set(title=title, xlabel="step", ylabel=f"{quantity} / predicted {quantity}", yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Runs the four trainings, prints the table and draws the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of each run")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/measure_dynamics.png"))
    arguments = parser.parse_args()

    half_life = equilibrium.adamw(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS).half_life
    table = Table(
        title=f"Over the prediction, last quarter of {arguments.steps} steps (half-life {half_life:.0f} steps)"
    )
    for column in (
        "model",
        "optimizer",
        "norm: smallest",
        "median",
        "largest layer",
        "angle: smallest",
        "median",
        "largest layer",
    ):
        table.add_column(column, justify="left" if column in ("model", "optimizer") else "right")
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for row, (title, build) in enumerate({"GPT-2": gpt2, "ViT": vit}.items()):
        runs = {optim: measure(build, optim, arguments.steps) for optim in COLORS}
        for panel, quantity, what in zip(panels[row], ("norm", "angle"), ("norm", "angle per step"), strict=True):
            draw(panel, runs, quantity, f"{title}: {what} of each layer")
        for optim, run in runs.items():
            numbers = [f"{value:.2f}" for quantity in ("norm", "angle") for value in settled(relative(run, quantity))]
            table.add_row(title, NAMES[optim], *numbers)
    panels[0][1].legend(frameon=False)
    arguments.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.figure, dpi=130)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
