"""What standardized weights cost: how much longer a training step takes with them (docs/standardization.md).

    python -m benchmarks.standardization_cost

Whole steps (forward, backward, AdamW) in float32 on one thread, of models with the shapes of MiniLM and of GPT-2 that
differ in nothing else. They take turns in one process, and the ratio of the medians of their processor time is what
counts, so that what else the machine does hits all alike. Prints a table and writes
benchmarks/results/standardization_cost.json; about half an hour. Exits with status 1 if a mode costs more than 3 % of a
step of 4,096 tokens. The cost does not depend on the batch, and a step on few tokens is over sooner.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_rotational import standardize
from hf_rotational.standardize.parametrization import EPS, MODES, Standardization

RESULTS = Path(__file__).parent / "results" / "standardization_cost.json"
ROUNDS, LIMIT = 9, 0.03


class WrittenOut(Standardization):
    """The formula as it is written, and as timm's ``StdConv2d`` was at first: mean and std, then elementwise."""

    def compute(self, weight: Tensor, gain: Tensor, mean: Tensor | None) -> Tensor:
        shape = [size if dim in self.neuron_dims else 1 for dim, size in enumerate(weight.shape)]
        span = [dim for dim in range(weight.ndim) if dim not in self.neuron_dims]
        std, centre = torch.std_mean(weight, dim=span, keepdim=True, correction=0)
        scaled = (weight - centre) / (std + EPS) * gain.view(shape)
        return scaled if mean is None else scaled + mean.view(shape)


class LayerNorm(Standardization):
    """``F.layer_norm`` over each neuron, then gain and mean."""

    def compute(self, weight: Tensor, gain: Tensor, mean: Tensor | None) -> Tensor:
        (dim,) = self.neuron_dims
        rows = weight.movedim(dim, 0)
        scaled = F.layer_norm(rows, rows.shape[1:], eps=EPS) * gain.unsqueeze(1)
        return (scaled if mean is None else scaled + mean.unsqueeze(1)).movedim(0, dim)


def minilm() -> nn.Module:
    """BERT with the sizes of all-MiniLM-L6-v2."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=14
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    """A third of GPT-2's layers and a third of its words: shapes and shares as in the whole, at a third of the time."""
    return GPT2LMHeadModel(GPT2Config(n_layer=4, vocab_size=50257 // 3, bos_token_id=0, eos_token_id=0))


def rows_of_tokens(rows: int, length: int) -> Tensor:
    return torch.randint(10_000, (rows, length), generator=torch.Generator().manual_seed(0))


LARGE: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "MiniLM, 32 x 128 tokens": (minilm, rows_of_tokens(32, 128)),
    "GPT-2, 4 x 1024 tokens": (gpt2, rows_of_tokens(4, 1024)),
}
SMALL: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "MiniLM, 16 x 64 tokens": (minilm, rows_of_tokens(16, 64)),
    "GPT-2, 1 x 1024 tokens": (gpt2, rows_of_tokens(1, 1024)),
    "GPT-2, 1 x 128 tokens": (gpt2, rows_of_tokens(1, 128)),
}
BATCHES = LARGE | SMALL
FORMS: dict[str, tuple[str, type[Standardization]] | None] = {
    "plain": None,
    **{mode: (mode, Standardization) for mode in MODES},
    "function_preserving, layer_norm": ("function_preserving", LayerNorm),
    "function_preserving, written out": ("function_preserving", WrittenOut),
}


@dataclass(frozen=True)
class Cost:
    batch: str
    form: str
    ms_per_step: float
    """Median."""
    overhead: float
    """Of the median, relative to the plain model's."""


def step_of(
    build: Callable[[], nn.Module], form: tuple[str, type[Standardization]] | None, tokens: Tensor
) -> Callable[[], float]:
    """A function that takes one training step and returns how many seconds of the processor it took."""
    torch.manual_seed(0)
    model = build()
    if form is not None:
        standardize(model, form[0])
        for module in model.modules():
            if isinstance(module, Standardization):
                module.__class__ = form[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = tokens if isinstance(model, GPT2LMHeadModel) else torch.zeros(len(tokens), dtype=torch.long)

    def step() -> float:
        start = time.thread_time()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.thread_time() - start

    return step


def measure(batch: str) -> list[Cost]:
    """All forms on one batch, in turns."""
    build, tokens = BATCHES[batch]
    steps = {name: step_of(build, form, tokens) for name, form in FORMS.items()}
    for step in steps.values():
        step()  # the first makes the optimizer's state
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        names = list(steps)[turn % len(steps) :] + list(steps)[: turn % len(steps)]  # no one always follows the same
        for name in names:
            times[name].append(steps[name]())
    plain = median(times["plain"])
    return [Cost(batch, name, 1e3 * median(series), median(series) / plain - 1) for name, series in times.items()]


def machine() -> dict[str, str | int]:
    """Facts that the milliseconds depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    torch.set_num_threads(1)
    costs = [cost for batch in BATCHES for cost in measure(batch)]
    table = Table(title="A training step with standardized weights: float32, AdamW (fused), one thread")
    for column in ("model and batch", "weights", "ms per step", "overhead"):
        table.add_column(column, justify="right" if column in ("ms per step", "overhead") else "left")
    for cost in costs:
        overhead = "" if cost.form == "plain" else f"{cost.overhead:+.1%}"
        last = cost.form == list(FORMS)[-1]
        table.add_row(cost.batch, cost.form, f"{cost.ms_per_step:.0f}", overhead, end_section=last)
    Console(width=120).print(table)
    result = {"machine": machine(), "rounds": ROUNDS, "costs": [asdict(cost) for cost in costs]}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(cost.overhead > LIMIT for cost in costs if cost.form in MODES and cost.batch in LARGE))


if __name__ == "__main__":
    main()
