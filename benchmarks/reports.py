"""An experiment's command line, and what its runs say: means over seeds, tables as the docs hold them, and curves."""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.training import ROOT, Outcome, Results, Run, train_missing


def command(
    name: str,
    description: str | None,
    runs: Callable[[argparse.Namespace], list[Run]],
    report: Callable[[Finished, Figure], Iterable[Table]],
    *,
    seeds: int,
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """An experiment's command line: trains ``runs`` of the arguments, prints what ``report`` returns, saves what it
    draws. Where ``add_arguments`` adds a ``--scale``, one that is not "cpu" has files of its own and trains one by one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="runs of each combination [%(default)s]")
    parser.add_argument("--workers", type=int, help="trainings at a time, of one thread each [a core each]")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run later than this")
    parser.add_argument("--report", action="store_true", help="train nothing: table and figure of what there is")
    parser.add_argument("--results", type=Path, help=f"[benchmarks/results/{name}.json]")
    parser.add_argument("--figure", type=Path, help=f"[docs/figures/{name}.png]")
    parser.set_defaults(scale="cpu")
    add_arguments(parser)
    arguments = parser.parse_args()

    large = arguments.scale != "cpu"
    stem = f"{name}_{arguments.scale}" if large else name
    results = Results(arguments.results or ROOT / "benchmarks" / "results" / f"{stem}.json")
    picture: Path = arguments.figure or ROOT / "docs" / "figures" / f"{stem}.png"
    planned = runs(arguments)
    if not arguments.report:
        train_missing(planned, results, arguments.workers or (1 if large else os.cpu_count() or 1), arguments.minutes)
    finished = Finished((run, results.outcome(run)) for run in planned)
    if not finished.outcomes:
        parser.exit(1, f"{results.file}: none of the {len(planned)} runs has been trained\n")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    console = Console(width=200)
    for printed in report(finished, figure):
        console.print(printed)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


class Finished:
    """The runs of an experiment that have been trained, by name of the method and learning rate."""

    def __init__(self, outcomes: Iterable[tuple[Run, Outcome | None]]) -> None:
        self.outcomes: dict[str, dict[float, dict[int, Outcome]]] = {}
        for run, outcome in outcomes:
            if outcome is not None:
                self.outcomes.setdefault(run.name, {}).setdefault(run.lr, {})[run.seed] = outcome

    def only(self, names: Iterable[str], prefix: str = "") -> Finished:
        """These methods, whose names here begin with the prefix."""
        chosen = Finished(())
        chosen.outcomes = {name: self.outcomes[prefix + name] for name in names if prefix + name in self.outcomes}
        return chosen

    @property
    def learning_rates(self) -> list[float]:
        return sorted({lr for by_lr in self.outcomes.values() for lr in by_lr})

    def values(self, name: str, lr: float, quantity: str = "loss") -> dict[int, float]:
        """A quantity of the last evaluation, or ``"train"`` for the training loss at the end, by seed."""
        outcomes = self.outcomes.get(name, {}).get(lr, {})
        return {
            seed: float(outcome["loss"] if quantity == "train" else outcome["evaluations"][-1][quantity])
            for seed, outcome in outcomes.items()
        }

    def mean(self, name: str, lr: float, quantity: str = "loss") -> float:
        values = self.values(name, lr, quantity).values()
        return statistics.fmean(values) if values else math.nan

    def best(self, name: str) -> float:
        """The learning rate with the lowest mean loss."""
        return min(self.outcomes[name], key=lambda lr: self.mean(name, lr))

    def curve(self, name: str, lr: float) -> tuple[list[int], list[float]]:
        """Steps and held-out losses, means over the seeds."""
        outcomes = [outcome["evaluations"] for outcome in self.outcomes[name][lr].values()]
        losses = [statistics.fmean(each["loss"] for each in point) for point in zip(*outcomes, strict=True)]
        return [each["step"] for each in outcomes[0]], losses


def deviation(values: Collection[float]) -> float:
    """Standard deviation; NaN for a single value or one that is infinite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def spread(values: Collection[float], form: str = ".3f") -> str:
    """Mean ± standard deviation; the mean alone of a single value, nothing of none."""
    if not values:
        return ""
    around = deviation(values)
    mean = f"{statistics.fmean(values):{form}}"
    return mean if math.isnan(around) else f"{mean} ± {around:{form.removeprefix('+')}}"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """In Markdown: docs hold it as it is printed."""
    printed = Table(title=title, box=box.MARKDOWN)
    for place, column in enumerate(columns):
        printed.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    return printed


def loss_table(title: str, finished: Finished, quantity: str = "loss") -> Table:
    """Mean and standard deviation over the seeds: a row for each method, a column for each learning rate."""
    rates = finished.learning_rates
    rows = [
        (name, *(spread(finished.values(name, lr, quantity).values()) for lr in rates), seeds_of(finished, name))
        for name in finished.outcomes
    ]
    return table(title, ("lr", *(f"{lr:g}" for lr in rates), "seeds"), rows)


def seeds_of(finished: Finished, name: str) -> str:
    """How many; from and to, where learning rates have more or fewer."""
    counts = {len(by_seed) for by_seed in finished.outcomes[name].values()}
    return "-".join(map(str, sorted({min(counts), max(counts)})))


def transfer_table(finished: Finished, baseline: str) -> Table:
    """What becomes of the baseline's best learning rate when only the method is changed."""
    theirs = finished.best(baseline)
    goal = finished.mean(baseline, theirs)

    def rows() -> Iterator[tuple[str, ...]]:
        for name in (name for name, by_lr in finished.outcomes.items() if theirs in by_lr):
            own = finished.best(name)
            switched, tuned = finished.mean(name, theirs), finished.mean(name, own)
            yield (
                name,
                f"{switched:.3f}",
                f"{switched / goal - 1:+.1%}",
                f"{tuned:.3f}",
                f"{tuned / goal - 1:+.1%}",
                f"{own:g}",
            )

    columns = ("", f"loss at lr {theirs:g}", "difference", "loss at its own best", "difference", "which is")
    return table(f"Only the method changed, from {baseline} at its best learning rate", columns, rows())


def draw_over_rates(
    panel: Axes, finished: Finished, quantity: str = "loss", names: Collection[str] = (), **properties: Any
) -> None:
    """A quantity over the learning rate, a line for each method (all, or those named), with the range of the seeds."""
    for name in names or finished.outcomes:
        rates = sorted(finished.outcomes.get(name, ()))
        means = [finished.mean(name, lr, quantity) for lr in rates]
        (line,) = panel.plot(rates, means, marker="o", markersize=4, label=name, **look(name))
        ranges = [finished.values(name, lr, quantity).values() for lr in rates]
        panel.fill_between(rates, list(map(min, ranges)), list(map(max, ranges)), color=line.get_color(), alpha=0.15)
    style(panel, xlabel="learning rate", xscale="log", **properties)
    panel.set_xticks(finished.learning_rates, [f"{lr:g}" for lr in finished.learning_rates])
    panel.minorticks_off()


def look(name: str) -> dict[str, str]:
    """Color and line of a method, the same in every figure: grey is plain, blue equilibrium, orange match; dashed is
    with warmup. Methods of other names take matplotlib's colors in turn."""
    line = {"linestyle": "--" if "% warmup" in name else "-"}
    if name.startswith("match"):
        return {"color": "#d1662b", **line}
    if name.startswith("equilibrium"):
        decay = re.search(r"decay ([\d.e-]+)", name)
        return {"color": SHADES.get(decay[1], BLUE) if decay else BLUE, **line}
    return {"color": "#5f5f5f", **line} if re.match(r"(AdamW|Lion|SGD)(,|$)", name) else line


BLUE = "#1f6fb4"
SHADES = {"0.05": "#8fc1e3", "0.2": "#0b2f57"}
"""Of weight decays that set the angle, other than the default's: those of the AdamW experiments."""


def draw_at_rate(panel: Axes, finished: Finished, lr: float, **properties: Any) -> None:
    """Loss at one learning rate: a row for each method, a dot for each seed, a bar at the mean."""
    names = [name for name, by_lr in finished.outcomes.items() if lr in by_lr]
    for place, name in enumerate(names):
        losses = list(finished.values(name, lr).values())
        panel.plot(losses, [place] * len(losses), "o", markersize=4, color="#1f6fb4", alpha=0.6)
        panel.plot(finished.mean(name, lr), place, "|", markersize=14, color="black")
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    style(panel, xlabel="held-out loss", title=f"lr {lr:g}", **properties)


def style(panel: Axes, **properties: Any) -> None:
    panel.set(**properties)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8)


def differences(finished: Finished, baseline: str, lr: float, quantity: str) -> tuple[dict[str, float], float]:
    """Of each method from a baseline at one learning rate, and the half width of their 95 % confidence interval.

    All methods see the same batches and start with the same head, so what a seed does to all of them is taken out, and
    what is left is pooled over the methods (a two-way analysis of variance without interaction): with few seeds, no
    method's own deviation says much. NaN with one seed. Methods that lack seeds of the baseline are left out.
    """
    values = {name: finished.values(name, lr, quantity) for name in finished.outcomes}
    seeds = sorted(values.get(baseline, ()))
    if not seeds:
        return {}, math.nan
    values = {name: by_seed for name, by_seed in values.items() if by_seed.keys() >= set(seeds)}
    numbers = np.array([[by_seed[seed] for seed in seeds] for by_seed in values.values()])
    residuals = numbers - numbers.mean(1, keepdims=True) - numbers.mean(0) + numbers.mean()
    above = dict(zip(values, numbers.mean(1) - numbers.mean(1)[list(values).index(baseline)], strict=True))
    freedom = (len(values) - 1) * (len(seeds) - 1)
    if not freedom:
        return above, math.nan
    error = math.sqrt((residuals**2).sum() / freedom)
    half_width = student_95(freedom) * error * math.sqrt(2 / len(seeds))
    return above, half_width


def student_95(freedom: int) -> float:
    """0.975-quantile of Student's distribution, by its expansion around the normal's: within 2 % from 4 degrees on."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def difference_table(
    title: str,
    finished: Finished,
    baseline: str,
    quantity: str = "loss",
    *,
    factor: float = 1.0,
    digits: int = 3,
    usual: tuple[float, float] | None = None,
) -> Table:
    """From the baseline at the same learning rate; bold: outside of the interval. The last column is the worst of the
    ``usual`` learning rates, from and to."""
    rates = finished.learning_rates
    compared = {lr: differences(finished, baseline, lr, quantity) for lr in rates}

    def cell(name: str, lr: float) -> str:
        difference, half_width = compared[lr]
        if name not in difference:
            return ""
        value = f"{factor * difference[name]:+.{digits}f}"
        return f"**{value}**" if abs(difference[name]) > half_width else value

    def worst(name: str) -> Iterator[str]:
        if usual:
            values = [compared[lr][0].get(name, math.nan) * factor for lr in rates if usual[0] <= lr <= usual[1]]
            value = (max if quantity == "loss" else min)(values, default=math.nan)
            yield "" if any(map(math.isnan, values)) else f"{value:+.{digits}f}"

    def rows() -> Iterator[tuple[str, ...]]:
        for name in finished.outcomes:
            if name != baseline and any(name in difference for difference, _ in compared.values()):
                yield name, *(cell(name, lr) for lr in rates), *worst(name)
        widths = (compared[lr][1] * factor for lr in rates)
        yield "95 % interval, ±", *("" if math.isnan(width) else f"{width:.{digits}f}" for width in widths), *last

    last, heading = ([""], [f"worst, {usual[0]:g} to {usual[1]:g}"]) if usual else ([], [])
    return table(title, ("lr", *(f"{lr:g}" for lr in rates), *heading), rows())


def paired_table(title: str, finished: Finished, names: Iterable[str], reference: str) -> Table:
    """Loss relative to that of the reference on the same seeds: mean and standard deviation."""
    names = [name for name in names if name in finished.outcomes and name != reference]
    rates = sorted({lr for name in names for lr in finished.outcomes[name]})

    def cell(name: str, lr: float) -> str:
        theirs, own = finished.values(reference, lr), finished.values(name, lr)
        return spread([own[seed] / theirs[seed] - 1 for seed in sorted(own.keys() & theirs.keys())], "+.1%")

    rows = [(name, *(cell(name, lr) for lr in rates), seeds_of(finished, name)) for name in names]
    return table(title, ("lr", *(f"{lr:g}" for lr in rates), "seeds"), rows)
