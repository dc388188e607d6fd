"""Pretraining: what leaving warmup out costs, how wide the range of good learning rates is, how many steps are saved.

A 4-layer GPT-2 learns the source of Python's standard library from scratch, at learning rates over two and a half
decades, with and without warmup.

    python -m benchmarks.need_for_warmup   # a run takes 20 seconds on one core; 108 by default

prints tables, writes benchmarks/results/need_for_warmup.json and draws docs/figures/need_for_warmup.png. With

    python -m benchmarks.need_for_warmup --scale gpu --seeds 1

it is a GPT-2 of 124 million parameters, all Python sources installed, and 131 million tokens a run, one run at a time;
the files are need_for_warmup_gpu.json and .png. ``--device`` and the sizes are arguments.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import fields

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.reports import (
    Finished,
    command,
    draw_over_rates,
    look,
    loss_table,
    spread,
    style,
    table,
    transfer_table,
)
from benchmarks.training import Method, Run, grid
from benchmarks.training_tasks import InstalledSources, LanguageModel

TASK = LanguageModel()
STEPS, EVALUATIONS = 300, 15
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WEIGHT_DECAY, BETAS, WARMUP = 0.1, (0.9, 0.95), 0.1
TOLERANCE = 0.02
"""A learning rate is good if its loss is at most this share above the best."""


def method(
    optim: str = "rotational_adamw", warmup: float = 0.0, weight_decay: float = WEIGHT_DECAY, **settings: object
) -> Method:
    return Method(optim, warmup, weight_decay, {"betas": BETAS, **settings})


PAIRS: Mapping[str, tuple[str, dict[str, object]]] = {
    "AdamW": ("adamw", {}),
    "equilibrium": ("rotational_adamw", {}),
    "match": ("rotational_adamw", {"rotation": "match"}),
}
METHODS = {
    f"{name}, {said}": method(optim, warmup, **settings)
    for name, (optim, settings) in PAIRS.items()
    for said, warmup in (("10 % warmup", WARMUP), ("no warmup", 0.0))
}
BASELINE = "AdamW, 10 % warmup"

GPU_METHODS = (BASELINE, "AdamW, no warmup", "equilibrium, no warmup")
GPU_LEARNING_RATES = (6e-4, 2e-3, 6e-3)
GPU_SIZES = {field.name: field.default for field in fields(InstalledSources)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu", help="[%(default)s]")
    gpu = parser.add_argument_group("with --scale gpu")
    gpu.add_argument("--steps", type=int, default=4000, help="[%(default)s]")
    for name, size in GPU_SIZES.items():
        gpu.add_argument(f"--{name}", type=type(size), default=size, help="[%(default)s]")


def runs(arguments: argparse.Namespace) -> list[Run]:
    if arguments.scale == "gpu":
        task = InstalledSources(**{name: getattr(arguments, name) for name in GPU_SIZES})
        methods = {name: METHODS[name] for name in GPU_METHODS}
        return grid(task, methods, GPU_LEARNING_RATES, seeds=arguments.seeds, steps=arguments.steps, evaluations=40)
    return grid(TASK, METHODS, LEARNING_RATES, seeds=arguments.seeds, steps=STEPS, evaluations=EVALUATIONS)


def good_range(finished: Finished, name: str) -> float:
    """How many times the largest good learning rate is the smallest, its ends interpolated on the grid; a lower bound
    where an end of the grid is good. 1 if none but the best is."""
    rates = sorted(finished.outcomes[name])
    losses = [finished.mean(name, lr) for lr in rates]
    limit, best = min(losses) * (1 + TOLERANCE), losses.index(min(losses))

    def end(places: range) -> float:
        last = best
        for place in places:
            if losses[place] > limit:  # infinite: the range ends at the last good one
                share = (limit - losses[last]) / (losses[place] - losses[last])
                return math.log(rates[last]) + share * (math.log(rates[place]) - math.log(rates[last]))
            last = place
        return math.log(rates[last])

    return math.exp(end(range(best + 1, len(rates))) - end(range(best - 1, -1, -1)))


def steps_to(finished: Finished, name: str, lr: float, goal: float) -> float:
    """The step at which the mean curve reaches a loss, interpolated; infinite if it does not."""
    steps, losses = finished.curve(name, lr)
    before = (0, math.inf)
    for step, loss in zip(steps, losses, strict=True):
        if loss <= goal:
            share = 1.0 if math.isinf(before[1]) else (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return math.inf


def summary(finished: Finished) -> Iterator[tuple[str, ...]]:
    """A row for each method, at its best learning rate."""
    baseline = finished.mean(BASELINE, finished.best(BASELINE))
    for name in finished.outcomes:
        lr = finished.best(name)
        losses = finished.values(name, lr).values()
        needed = steps_to(finished, name, lr, baseline) / finished.curve(name, lr)[0][-1]
        yield (
            name,
            f"{lr:g}",
            spread(losses),
            f"{finished.mean(name, lr) / baseline - 1:+.1%}",
            f"{good_range(finished, name):.1f}x",
            f"{needed:.0%}" if math.isfinite(needed) else "not reached",
        )


def cost_of_no_warmup(finished: Finished) -> Iterator[tuple[str, ...]]:
    """Loss without warmup relative to with it: at the same learning rate, and best against best."""
    for name in PAIRS:
        with_it, without = f"{name}, 10 % warmup", f"{name}, no warmup"
        if {with_it, without} <= finished.outcomes.keys():
            pairs = [(lr, lr) for lr in finished.learning_rates]
            pairs.append((finished.best(with_it), finished.best(without)))
            yield name, *(f"{finished.mean(without, b) / finished.mean(with_it, a) - 1:+.1%}" for a, b in pairs)


def step_times(finished: Finished) -> Iterator[tuple[str, ...]]:
    """Milliseconds of a step, forward and backward included, where they were measured."""
    for name, by_lr in finished.outcomes.items():
        times = [outcome.get("step_seconds") for by_seed in by_lr.values() for outcome in by_seed.values()]
        if all(times):
            yield name, f"{1e3 * statistics.median(times):.1f}"


def report(finished: Finished, figure: Figure) -> Iterator[Table]:
    yield loss_table("Held-out loss, mean ± deviation", finished)
    columns = ("", "best lr", "held-out loss", f"against {BASELINE}", f"lr within {TOLERANCE:.0%}", "steps to its loss")
    yield table(f"At the best learning rate; its loss: the final one of {BASELINE}", columns, summary(finished))
    rates = (f"lr {lr:g}" for lr in finished.learning_rates)
    yield table("What leaving warmup out costs", ("", *rates, "best to best"), cost_of_no_warmup(finished))
    yield transfer_table(finished, BASELINE)
    times = list(step_times(finished))
    if times:
        yield table("Median step", ("", "ms"), times)
    left, right = figure.subplots(1, 2)
    draw_over_rates(left, finished, title="GPT-2 from scratch", ylabel="held-out loss")
    low = min(finished.mean(name, finished.best(name)) for name in finished.outcomes)
    left.set_ylim(low * 0.98, low * 1.4)
    for name in finished.outcomes:
        lr = finished.best(name)
        right.plot(*finished.curve(name, lr), label=f"{name}, lr {lr:g}", **look(name))
    goal = finished.mean(BASELINE, finished.best(BASELINE))
    right.axhline(goal, color="black", linewidth=0.8, linestyle=":", label=f"final loss of {BASELINE}")
    style(right, title="At the best learning rate", xlabel="step", ylabel="held-out loss", ylim=(low * 0.98, low * 1.5))


def main() -> None:
    command("need_for_warmup", __doc__, runs, report, seeds=3, add_arguments=add_arguments)


if __name__ == "__main__":
    main()
