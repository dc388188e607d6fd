"""How much the details of the rotational update matter: its running average, centering, and what is one neuron.

    python -m examples.paper.sensitivity   # a run takes 15 seconds on one core; 60 by default

One setting at a time is changed from the default. Prints tables, writes benchmarks/results/sensitivity.json and draws
docs/figures/sensitivity.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.need_for_warmup import STEPS, TASK, method
from benchmarks.reports import Finished, command, draw_at_rate, loss_table, paired_table
from benchmarks.training import Run, grid

LEARNING_RATES = (1e-2, 1e-1)
DEFAULT = "default"
METHODS = {
    DEFAULT: method(),
    **{f"update_norm_decay {decay:g}": method(update_norm_decay=decay) for decay in (0.0, 0.5, 0.99)},
    "transient correction": method(transient_correction=True),
    **{f"centering {what}": method(centering=what) for what in ("updates", "weights")},
    "granularity tensor": method(granularity="tensor"),
    "learned gains": method(gains="learned"),
    "embeddings too": method(embeddings=True),
}


def runs(arguments: argparse.Namespace) -> list[Run]:
    return grid(TASK, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table("Held-out loss, mean ± deviation", finished)
    yield paired_table("Loss relative to the default's", finished, METHODS, DEFAULT)
    rates = finished.learning_rates
    for panel, lr in zip(figure.subplots(1, len(rates), squeeze=False).flat, rates, strict=True):
        draw_at_rate(panel, finished, lr)


def main() -> None:
    command("sensitivity", __doc__, runs, report, seeds=3)


if __name__ == "__main__":
    main()
