"""Learning rate against weight decay at a constant product: is it the product that counts?

At equilibrium a neuron turns by ``sqrt(2 lr wd (1-b1)/(1+b1))`` per step, so runs with one product of learning rate and
weight decay should be alike. For AdamW they are only once equilibrium is reached, and its parameters that have none
(biases, norms) still feel the learning rate. A rotational neuron turns by exactly this angle from the first step on.

    python -m examples.paper.lr_times_weight_decay   # a run takes 15 seconds on one core; 27 by default

prints a table, writes benchmarks/results/lr_times_weight_decay.json and draws docs/figures/lr_times_weight_decay.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.need_for_warmup import STEPS, TASK, WARMUP, method
from benchmarks.reports import Finished, command, draw_over_rates, loss_table, table
from benchmarks.training import Method, Run, grid

PRODUCT = 1e-2  # the half-life is ln2/2 of its inverse: 35 steps
LEARNING_RATES = (1e-3, 1e-2, 1e-1)
METHODS: dict[str, Callable[[float], Method]] = {
    "AdamW, 10 % warmup": lambda lr: method("adamw", WARMUP, PRODUCT / lr),
    "AdamW, no warmup": lambda lr: method("adamw", 0.0, PRODUCT / lr),
    "equilibrium, no warmup": lambda lr: method(weight_decay=PRODUCT / lr),
}


def runs(arguments: argparse.Namespace) -> list[Run]:
    return grid(TASK, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table(f"Held-out loss at weight decay {PRODUCT:g} / lr", finished)

    def spans() -> Iterator[tuple[str, ...]]:
        for name, by_lr in finished.outcomes.items():
            losses = [finished.mean(name, lr) for lr in by_lr]
            yield name, f"{min(losses):.3f}", f"{max(losses):.3f}", f"{max(losses) / min(losses) - 1:.1%}"

    yield table("Over the learning rates", ("", "best", "worst", "apart"), spans())
    draw_over_rates(figure.subplots(), finished, title=f"lr x weight decay = {PRODUCT:g}", ylabel="held-out loss")


def main() -> None:
    command("lr_times_weight_decay", __doc__, runs, report, seeds=3)


if __name__ == "__main__":
    main()
