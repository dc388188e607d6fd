"""How much the details of the rotational update matter: its running average, centering, and what is one neuron.

    python -m examples.paper.sensitivity   # a run takes 20 seconds on one core; 54 by default

One setting at a time is changed from the default. Prints tables, writes benchmarks/results/sensitivity.json and draws
docs/figures/sensitivity.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.need_for_warmup import STEPS, TASK, method
from benchmarks.training import Finished, Run, command, draw_over_rates, grid, loss_table, table

LEARNING_RATES = (3e-3, 1e-2, 1e-1)
DEFAULT = "default"
METHODS = {
    DEFAULT: method(),
    **{f"update_norm_decay {decay:g}": method(update_norm_decay=decay) for decay in (0.0, 0.5, 0.99)},
    "transient correction": method(transient_correction=True),
    **{f"centering {what}": method(centering=what) for what in ("updates", "weights")},
    "granularity tensor": method(granularity="tensor"),
    "learned gains": method(gains="learned"),
}


def runs(arguments: argparse.Namespace) -> list[Run]:
    return grid(TASK, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table("Held-out loss, mean ± deviation", finished)
    rates = finished.learning_rates

    def rows() -> Iterator[tuple[str, ...]]:
        for name in finished.outcomes:
            changes = (finished.mean(name, lr) / finished.mean(DEFAULT, lr) - 1 for lr in rates)
            yield name, *("" if math.isnan(change) else f"{change:+.2%}" for change in changes)

    yield table("Loss relative to the default's", ("", *(f"lr {lr:g}" for lr in rates)), rows())
    draw_over_rates(figure.subplots(), finished, title="One setting changed", ylabel="held-out loss")


def main() -> None:
    command("sensitivity", __doc__, runs, report, seeds=2)


if __name__ == "__main__":
    main()
