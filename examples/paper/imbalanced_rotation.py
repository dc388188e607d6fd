"""Imbalanced rotation: what if a tenth of the neurons turns ten times as fast, or as slowly, as the others?

Every weight matrix is held in two pieces, every tenth neuron in the second, whose angle has a factor. The angle of the
others is tuned with the learning rate, so that it is balance that is compared and not the mean.

    python -m examples.paper.imbalanced_rotation   # a run takes 15 seconds on one core; 27 by default

prints tables, writes benchmarks/results/imbalanced_rotation.json and draws docs/figures/imbalanced_rotation.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.need_for_warmup import STEPS, TASK, method
from benchmarks.reports import Finished, command, draw_over_rates, loss_table, paired_table, spread, table
from benchmarks.training import Run, grid
from benchmarks.training_tasks import LanguageModel
from hf_rotational import plan

LEARNING_RATES = (1e-2, 3e-2, 1e-1)
EVERY, FACTOR = 10, 10.0


class Pieces(nn.Module):
    """A weight made of two: its neurons but every tenth, and these."""

    def __init__(self, neuron_dims: tuple[int, ...], neurons: int) -> None:
        super().__init__()
        self.neuron_dims = neuron_dims  # where the plan looks for what neurons are along
        chosen = torch.arange(neurons) % EVERY == EVERY - 1
        self.parts = [(~chosen).nonzero().flatten(), chosen.nonzero().flatten()]
        self.order = torch.cat(self.parts).argsort()

    def forward(self, most: Tensor, few: Tensor) -> Tensor:
        return torch.cat([most, few], self.neuron_dims[0]).index_select(self.neuron_dims[0], self.order)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.index_select(self.neuron_dims[0], part) for part in self.parts)


@dataclass(frozen=True)
class InPieces(LanguageModel):
    """The same function and gradients, and parameters in two pieces each."""

    def build(self, seed: int) -> nn.Module:
        model = super().build(seed)
        for entry in plan(model).rotating:
            path, _, leaf = entry.name.rpartition(".")
            pieces = Pieces(entry.neuron_dims, entry.parameter.shape[entry.neuron_dims[0]])
            register_parametrization(model.get_submodule(path), leaf, pieces)
        return model


METHODS = {
    "balanced": method(),
    "a tenth 10 x faster": method(multipliers={"original1": FACTOR}),
    "a tenth 10 x slower": method(multipliers={"original1": 1 / FACTOR}),
}


def runs(arguments: argparse.Namespace) -> list[Run]:
    return grid(InPieces(**asdict(TASK)), METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS)


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table("Held-out loss, mean ± deviation", finished)
    yield paired_table("Loss relative to balanced", finished, METHODS, "balanced")
    best = {name: finished.best(name) for name in finished.outcomes}
    rows = ((name, f"{lr:g}", spread(finished.values(name, lr).values())) for name, lr in best.items())
    yield table("At the best learning rate", ("", "lr", "held-out loss"), rows)
    draw_over_rates(figure.subplots(), finished, title="Balanced and imbalanced rotation", ylabel="held-out loss")


def main() -> None:
    command("imbalanced_rotation", __doc__, runs, report, seeds=3)


if __name__ == "__main__":
    main()
