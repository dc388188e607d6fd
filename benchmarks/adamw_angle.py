"""How large AdamW's updates are when fine-tuning: the constant that ``rotation="match"`` goes by.

    python -m benchmarks.adamw_angle            # 10 minutes on a core
    python -m benchmarks.adamw_angle --report   # the table of the results file

Fine-tunes MiniLM on the demo's docstrings with AdamW at a constant learning rate, and measures the root mean square of
the updates of all weights that would rotate, over the learning rate. Independent updates would have
sqrt((1-b1)/(1+b1)); ``match`` assumes twice that. Prints a table and writes benchmarks/results/adamw_angle.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.reports import spread, table
from benchmarks.training import ROOT, machine
from benchmarks.training_tasks import Classification
from hf_rotational import plan

RESULTS = ROOT / "benchmarks" / "results" / "adamw_angle.json"
STEPS, SEEDS = 100, 3
MOMENTA = (0.9, 0.95)
LEARNING_RATES = (2e-5, 1e-4, 3e-4)
SHOWN = ((1, 1), (8, 8), (11, 20), (21, 50), (51, 100))
"""Steps, from and to."""


def measure(momentum: float, lr: float, seed: int) -> list[float]:
    """Root mean square of AdamW's updates over the learning rate, in each step."""
    task = Classification()
    model = task.build(seed).train()
    weights = [entry.parameter for entry in plan(model).rotating]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(momentum, 0.999), weight_decay=0.0, fused=True)
    batches, sizes = task.batches(seed), []
    for _ in range(STEPS):
        task.loss(model, next(batches)).backward()
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        optimizer.zero_grad()
        square = sum(float((weight.detach() - old).square().sum()) for weight, old in zip(weights, before, strict=True))
        sizes.append(math.sqrt(square / sum(weight.numel() for weight in weights)) / lr)
    return sizes


def report(runs: list[dict[str, Any]]) -> Iterator[Table]:
    columns = ("", "match", *(f"step {a}" if a == b else f"{a} to {b}" for a, b in SHOWN))

    def rows() -> Iterator[tuple[str, ...]]:
        for momentum in MOMENTA:
            for lr in LEARNING_RATES:
                found = [run["sizes"] for run in runs if (run["momentum"], run["lr"]) == (momentum, lr)]
                means = [[statistics.fmean(sizes[a - 1 : b]) for sizes in found] for a, b in SHOWN]
                assumed = 2 * math.sqrt((1 - momentum) / (1 + momentum))
                yield f"b1 {momentum:g}, lr {lr:g}", f"{assumed:.2f}", *(spread(values, ".2f") for values in means)

    yield table("Root mean square of AdamW's updates over the learning rate", columns, rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing: the table of what there is")
    if not parser.parse_args().report:
        torch.set_num_threads(1)
        runs = [
            {"momentum": momentum, "lr": lr, "seed": seed, "sizes": [round(s, 4) for s in measure(momentum, lr, seed)]}
            for momentum in MOMENTA
            for lr in LEARNING_RATES
            for seed in range(SEEDS)
        ]
        RESULTS.write_text(json.dumps({"machine": machine(), "runs": runs}) + "\n", encoding="utf-8")
    console = Console(width=200)
    for printed in report(json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]):
        console.print(printed)


if __name__ == "__main__":
    main()
