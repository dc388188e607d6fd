"""Fine-tuning beyond AdamW and whole text models: Lion, SGD, LoRA and images.

Each optimizer with 10 % warmup, without, and its rotational form without, at learning rates around its usual ones:
MiniLM and the demo's docstrings as in ``fine_tuning``, the same with LoRA on queries and values, and a small ViT that
is pretrained here on handwritten digits from 0 to 4 and fine-tuned to tell 5 to 9 apart.

    python -m benchmarks.fine_tuning_more   # a run takes 3 to 25 seconds on one core; 189 by default

prints tables, writes benchmarks/results/fine_tuning_more.json and draws docs/figures/fine_tuning_more.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.fine_tuning import STEPS, rotational
from benchmarks.reports import Finished, command, difference_table, draw_over_rates, loss_table
from benchmarks.training import Method, Run, Task, grid
from benchmarks.training_tasks import Classification, Images, LoraClassification

WARMUP = 0.1


@dataclass(frozen=True)
class Experiment:
    """A task, and methods, the first of which the others are compared with."""

    task: Task
    methods: Mapping[str, Method]
    learning_rates: Sequence[float]
    steps: int = STEPS


def peers(name: str, optim: str, **settings: object) -> dict[str, Method]:
    """A plain optimizer with warmup and without."""
    return {f"{name}, 10 % warmup": Method(optim, WARMUP, settings=settings), name: Method(optim, settings=settings)}


def equilibria(optim: str, *decays: float, **settings: object) -> dict[str, Method]:
    """Its rotational form, whose angle is equilibrium's at these weight decays; what does not rotate has none."""
    return {
        f"equilibrium, decay {decay:g}": rotational(optim, angle_weight_decay=decay, **settings) for decay in decays
    }


def adamw(*decays: float) -> dict[str, Method]:
    return {
        **peers("AdamW", "adamw"),
        "match": rotational(rotation="match"),
        **equilibria("rotational_adamw", *decays),
    }


EXPERIMENTS: Mapping[str, Experiment] = {
    "LoRA": Experiment(LoraClassification(), adamw(0.05, 0.1), (1e-3, 3e-3, 1e-2)),
    "ViT": Experiment(Images(), adamw(0.05, 0.1, 0.2), (3e-4, 1e-3, 3e-3, 1e-2), steps=300),
    "Lion": Experiment(
        Classification(),
        {**peers("Lion", "lion"), **equilibria("rotational_lion", 0.05, 0.5)},
        (3e-5, 1e-4, 3e-4),
    ),
    "SGD with momentum": Experiment(
        Classification(),
        {**peers("SGD", "sgd", momentum=0.9), **equilibria("rotational_sgd", 1e-4, 0.05, momentum=0.9)},
        (3e-3, 1e-2, 3e-2),
    ),
}


def runs(arguments: argparse.Namespace) -> list[Run]:
    return [
        run
        for title, each in EXPERIMENTS.items()
        for run in grid(
            each.task,
            {f"{title}: {name}": method for name, method in each.methods.items()},
            each.learning_rates,
            seeds=arguments.seeds,
            steps=each.steps,
        )
    ]


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    figure.set_size_inches(11, 8)
    for panel, (title, each) in zip(figure.subplots(2, 2).flat, EXPERIMENTS.items(), strict=True):
        part = finished.only(each.methods, f"{title}: ")
        if not part.outcomes:
            continue
        baseline = next(iter(each.methods))
        yield loss_table(f"{title}: held-out loss, mean ± deviation", part)
        yield difference_table(f"{title}: held-out loss minus that of {baseline}", part, baseline)
        yield loss_table(f"{title}: accuracy", part, "accuracy")
        draw_over_rates(panel, part, title=title, ylabel="held-out loss")


def main() -> None:
    command("fine_tuning_more", __doc__, runs, report, seeds=3)


if __name__ == "__main__":
    main()
