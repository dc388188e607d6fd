"""Adam with L2 regularization against AdamW: is it the balance of rotation that makes the difference?

With decoupled weight decay all neurons come to turn by one angle; with L2 regularization the angle depends on the size
of a neuron's gradients. The paper finds most of Adam's lag behind AdamW gone once it is made to rotate evenly.

    python -m examples.paper.adam_l2_balance   # a run takes 15 seconds on one core; 33 by default

Every method at AdamW's best learning rate, with the best of its weight decays. Prints tables, writes
benchmarks/results/adam_l2_balance.json and draws docs/figures/adam_l2_balance.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.need_for_warmup import BETAS, STEPS, TASK, WARMUP, method
from benchmarks.reports import Finished, command, draw_at_rate, loss_table, spread, table
from benchmarks.training import Method, Run, grid
from hf_rotational import equilibrium

LEARNING_RATES = (3e-3,)
DECAYS, L2 = (0.1, 1.0), (1e-4, 1e-3, 1e-2)
FAMILIES = ("AdamW", "Adam + L2", "rotational AdamW", "rotational Adam + L2")


def balanced(optim: str, weight_decay: float, l2: float) -> Callable[[float], Method]:
    """Turns by AdamW's angle at a weight decay, whatever the L2 term, which only changes directions."""

    def at(lr: float) -> Method:
        angle = equilibrium.adamw(lr=lr, weight_decay=weight_decay, betas=BETAS).rotation
        return method(optim, WARMUP, l2, rotation=angle)

    return at


METHODS: dict[str, Method | Callable[[float], Method]] = {
    **{f"AdamW, {decay:g}": method("adamw", WARMUP, decay) for decay in DECAYS},
    **{f"Adam + L2, {l2:g}": method("adam", WARMUP, l2) for l2 in L2},
    **{f"rotational AdamW, {decay:g}": balanced("rotational_adamw", decay, 0.1) for decay in DECAYS},
    **{
        f"rotational Adam + L2, {decay:g}, {l2:g}": balanced("rotational_adam", decay, l2)
        for decay in DECAYS
        for l2 in L2[:2]
    },
}


def runs(arguments: argparse.Namespace) -> list[Run]:
    return grid(TASK, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)


def best_of(finished: Finished, family: str) -> tuple[float, str, float]:
    """Loss, method and learning rate."""
    names = [name for name in finished.outcomes if name.startswith(f"{family},")]
    return min((finished.mean(name, lr), name, lr) for name in names for lr in finished.outcomes[name])


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table("Held-out loss, mean ± deviation", finished)
    families = [family for family in FAMILIES if any(name.startswith(f"{family},") for name in finished.outcomes)]
    best = {family: best_of(finished, family) for family in families}

    def rows() -> Iterator[tuple[str, ...]]:
        for family, (_, name, lr) in best.items():
            yield family, name.removeprefix(f"{family}, "), f"{lr:g}", spread(finished.values(name, lr).values())

    yield table("The best of each", ("", "weight decay, L2", "lr", "held-out loss"), rows())
    rates = finished.learning_rates
    for panel, lr in zip(figure.subplots(1, len(rates), squeeze=False).flat, rates, strict=True):
        draw_at_rate(panel, finished, lr)


def main() -> None:
    command("adam_l2_balance", __doc__, runs, report, seeds=3)


if __name__ == "__main__":
    main()
