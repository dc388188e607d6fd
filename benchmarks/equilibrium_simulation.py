"""Random walks of plain optimizers against the closed forms: norm, rotation and half-life (docs/equilibrium.md).

    python -m benchmarks.equilibrium_simulation

prints a table and writes benchmarks/results/equilibrium_simulation.json and docs/figures/equilibrium_simulation.png
(needs matplotlib); 2 minutes on one core.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hf_rotational import equilibrium
from hf_rotational.equilibrium import Equilibrium, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "equilibrium_simulation.json"
FIGURE = ROOT / "docs" / "figures" / "equilibrium_simulation.png"

LR, MOMENTUM = 1e-2, 0.9
NEURONS, FAN_IN = 64, 128
GRAD_NORM = math.sqrt(FAN_IN - 1)  # of FAN_IN normal entries, the one along the weight is taken out
ABOVE, BELOW = 3.0, 0.5  # start norms, relative to the predicted norm
SETTLING, SETTLED = 3, 12  # half-lives from the predicted norm until it is measured, and for which
COURSE = 5  # half-lives from any other start


@dataclass(frozen=True)
class Case:
    """A plain optimizer at one setting."""

    optim: str
    decay: float
    """Learning rate times weight decay, over 1 - momentum for SGD: the inverse of a walk's time scale."""
    hyperparameters: dict[str, Any]
    scale_invariant: bool = True

    @property
    def weight_decay(self) -> float:
        return self.decay / LR * (1 - float(self.hyperparameters.get("momentum", 0.0)))

    @property
    def predicted(self) -> Equilibrium:
        """The closed form; with the half-life near equilibrium for Adam+L2, which has none further away."""
        form: Callable[..., Equilibrium] = getattr(equilibrium, self.optim)
        sizes = {
            "sgdm": {"grad_norm": GRAD_NORM},
            "adam_l2": {"fan_in": FAN_IN, "grad_l1": math.sqrt(FAN_IN) * GRAD_NORM},
        }
        record = form(
            lr=LR, weight_decay=self.weight_decay, **sizes.get(self.optim, {"fan_in": FAN_IN}), **self.hyperparameters
        )
        return replace(record, half_life=uniform_half_life(self, record)) if record.half_life is None else record

    @property
    def power(self) -> int:
        """Of the norm: what the half-life is about."""
        return 4 if self.optim == "sgdm" else 2


def uniform_half_life(case: Case, record: Equilibrium) -> float:
    """Adam+L2 near equilibrium, all entries of the gradient of one size (docs/equilibrium.md)."""
    beta1 = float(case.hyperparameters["betas"][0])
    return 2 * math.log(2) / 3 * (1 - beta1) / (1 + beta1) / known(record.rotation) ** 2


FAST, SLOW = 1e-3, 2e-4
BETAS, LONG_MEMORY, HEAVY_BALL = {"betas": (0.9, 0.99)}, {"betas": (0.9, 0.999)}, {"momentum": MOMENTUM}
FIGURE_CASES = {
    "AdamW": Case("adamw", SLOW, BETAS),
    "SGD with momentum": Case("sgdm", SLOW, HEAVY_BALL),
    "Lion": Case("lion", SLOW, BETAS),
    "Adam + L2": Case("adam_l2", SLOW, BETAS),
}
CASES = [
    case
    for decay in (FAST, SLOW)
    for case in (
        Case("adamw", decay, BETAS, scale_invariant=False),
        Case("adamw", decay, BETAS),
        Case("adamw", decay, LONG_MEMORY),
        Case("sgdm", decay, HEAVY_BALL),
        Case("lion", decay, BETAS, scale_invariant=False),
        Case("lion", decay, BETAS),
        Case("adam_l2", decay, BETAS),
    )
]


def known(value: float | None) -> float:
    assert value is not None
    return value


@dataclass(frozen=True)
class Course:
    """How a walk came to equilibrium: RMS over the neurons at every step, relative to the prediction."""

    norm: NDArray[np.float64]
    rotation: NDArray[np.float64]


def course(case: Case, start: float, half_lives: float) -> Course:
    predicted = case.predicted
    walk = simulate(
        case.optim,
        lr=LR,
        weight_decay=case.weight_decay,
        steps=round(half_lives * known(predicted.half_life)),
        fan_in=FAN_IN,
        neurons=NEURONS,
        start_norm=start * known(predicted.norm),
        scale_invariant=case.scale_invariant,
        **case.hyperparameters,
    )
    norm, rotation = (np.sqrt((values**2).mean(axis=1)) for values in (walk.norm, walk.rotation))
    return Course(norm / known(predicted.norm), rotation / known(predicted.rotation))


def predicted_course(case: Case, start: float, half_lives: NDArray[np.float64]) -> Course:
    """What the half-life says, at these times; for Adam+L2, whose course is no exponential, its differential equation
    ``d|w|^2/dt = 2 ln2/3 (1 - |w|^3)``, in units of half-lives."""
    if case.optim == "adam_l2":
        norm_sq = np.empty_like(half_lives)
        norm_sq[0] = start**2
        for index, passed in enumerate(np.diff(half_lives)):
            norm_sq[index + 1] = norm_sq[index] + passed * 2 * math.log(2) / 3 * (1 - norm_sq[index] ** 1.5)
        norm = np.sqrt(norm_sq)
    else:
        norm = (1 + (start**case.power - 1) * 0.5**half_lives) ** (1 / case.power)
    # SGD's updates are proportional to the gradient, which shrinks as the norm grows; the others' have one size.
    return Course(norm, norm ** (-2 if case.optim == "sgdm" else -1))


def halving(case: Case, start: float, norm: NDArray[np.float64]) -> int:
    """Steps until the distance from equilibrium is half of what it was."""
    away = (norm**case.power - 1) / (start**case.power - 1)
    return int(np.flatnonzero(away <= 1 / 2)[0]) + 1


def halving_deviation(case: Case, start: float, walked: Course) -> float:
    times = np.arange(1, len(walked.norm) + 1) / known(case.predicted.half_life)
    expected = halving(case, start, predicted_course(case, start, times).norm)
    return halving(case, start, walked.norm) / expected - 1


def measure(case: Case, courses: dict[float, Course]) -> dict[str, Any]:
    """One row of the results: deviations are relative to the prediction."""
    settled = course(case, 1.0, SETTLING + SETTLED)
    tail = slice(len(settled.norm) * SETTLING // (SETTLING + SETTLED), None)
    return {
        **asdict(case),
        "weight_decay": case.weight_decay,
        "predicted": asdict(case.predicted),
        "norm": rms(settled.norm[tail]) - 1,
        "rotation": rms(settled.rotation[tail]) - 1,
        "half_life_from_above": halving_deviation(case, ABOVE, courses[ABOVE]),
        "half_life_from_below": halving_deviation(case, BELOW, courses[BELOW]),
    }


def rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt((values**2).mean()))


def table(rows: list[dict[str, Any]]) -> Table:
    printed = Table(
        title=f"Simulated relative to predicted: {NEURONS} neurons of {FAN_IN} entries, lr {LR:g} (SGD: lr wd is over "
        f"1 - momentum); half-life from {ABOVE:g} and {BELOW:g} times the predicted norm"
    )
    for title in (
        "optimizer",
        "lr wd",
        "hyperparameters",
        "gradients",
        "norm",
        "rotation",
        "half-life",
        "above",
        "below",
    ):
        printed.add_column(title, justify="left" if title in ("optimizer", "hyperparameters", "gradients") else "right")
    for row in rows:
        printed.add_row(
            row["optim"],
            f"{row['decay']:g}",
            ", ".join(f"{name} {value}" for name, value in row["hyperparameters"].items()),
            "scale-invariant" if row["scale_invariant"] else "free",
            f"{row['norm']:+.1%}",
            f"{row['rotation']:+.1%}",
            f"{row['predicted']['half_life']:.0f}",
            *(f"{row[f'half_life_from_{side}']:+.0%}" for side in ("above", "below")),
        )
    return printed


def draw(walked: dict[str, tuple[Case, dict[float, Course]]]) -> None:
    """Norm (top) and rotation (bottom) on the way to equilibrium, simulated and predicted: a column per optimizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplots(2, len(walked), sharex=True, sharey="row")
    for column, (title, (case, courses)) in enumerate(walked.items()):
        panels[0, column].set_title(title)
        for start, color in zip(courses, ("#d1662b", "#1f6fb4"), strict=True):
            draw_course(panels[:, column], case, start, courses[start], color)
    panels[0, 0].set_ylabel("norm / predicted norm")
    panels[1, 0].set_ylabel("rotation per step / predicted")
    for panel in panels[1]:
        panel.set_xlabel("steps / predicted half-life")
    for panel in panels.flat:
        panel.axhline(1, color="#7f7f7f", linewidth=0.8)
        panel.set_yscale("log")
        panel.grid(alpha=0.25, linewidth=0.5, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    for row, ticks in zip(panels, ([0.5, 1, 2, 3], [0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8]), strict=True):
        row[0].set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        row[0].minorticks_off()
    panels[0, 0].legend(frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def draw_course(panels: Sequence[Axes], case: Case, start: float, walked: Course, color: str) -> None:
    """The simulated course as a line, and the prediction as dashes on top."""
    times = np.arange(1, len(walked.norm) + 1) / known(case.predicted.half_life)
    expected = predicted_course(case, start, times)
    for panel, simulated, predicted in zip(
        panels, (walked.norm, walked.rotation), (expected.norm, expected.rotation), strict=True
    ):
        panel.plot(times, simulated, color=color, linewidth=2.2, alpha=0.55, label=f"simulated, from {start:g}x")
        dashes = (0, (3, 3))
        panel.plot(
            times, predicted, color="black", linestyle=dashes, linewidth=1, label=None if start < 1 else "predicted"
        )


def main() -> None:
    rows, drawn = [], {}
    for case in CASES:
        courses = {start: course(case, start, COURSE) for start in (ABOVE, BELOW)}
        rows.append(measure(case, courses))
        if case in FIGURE_CASES.values():
            drawn[case.optim] = (case, courses)
    Console(width=130).print(table(rows))
    walked = {"neurons": NEURONS, "fan_in": FAN_IN, "lr": LR, "starts": [ABOVE, BELOW], "settled_half_lives": SETTLED}
    text = json.dumps({"numpy": np.__version__, "walk": walked, "rows": rows}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    draw({title: drawn[case.optim] for title, case in FIGURE_CASES.items()})


if __name__ == "__main__":
    main()
