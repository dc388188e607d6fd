"""Pictures of training runs. matplotlib comes with the ``plots`` extra and is imported only when one is drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One per run, in every panel; further runs begin again.
COLORS = ("#7f7f7f", "#1f6fb4", "#d1662b", "#3a8f4d", "#8a4fa3", "#b8912b", "#c2417c", "#3aa3a3")
SMOOTHING = 0.8  # how much of the running average each step of the smoothed loss keeps
WIDTH = 5.2  # inches, of the pictures of a report: on a narrow screen, too, their text can be read
TARGET: Mapping[str, Any] = {"color": "black", "linestyle": (0, (4, 4)), "linewidth": 1.2}
PREDICTION: Mapping[str, Any] = {"color": "#c22f2f", "linestyle": (0, (1, 1.5)), "linewidth": 1.6}
HEAT_RANGE = 4.0  # ratios beyond it, or below its inverse, get the colors at the ends


@dataclass(frozen=True)
class Run:
    """One training run, as it is drawn."""

    name: str
    losses: Sequence[tuple[float, float]]
    """(step, training loss of that step)."""
    rotation: Sequence[Mapping[str, Any]]
    """``RotationMonitor.records``: "step", "rotation" and "target" (radians; None where the optimizer has none), and
    for the pictures of a report "balance" and "layers"."""
    evaluations: Sequence[tuple[float, float]] = ()
    """(step, loss on the evaluation set)."""
    predictions: Sequence[float | None] = ()
    """For each of the measured steps the angle at which AdamW would settle; empty where that is not known."""


def require_matplotlib() -> None:
    """Raises ``ImportError``, with the command that installs it, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib. Run: pip install 'hf-rotational[plots]'") from error


def plot_runs(runs: Sequence[Run], file: Path, colors: Sequence[str] = COLORS) -> None:
    """Draws training loss (left) and rotation per step against its target (right) of ``runs`` into the PNG ``file``."""
    figure, (left, right) = new_figure(11, 4.2, columns=2)
    for run, color in zip(runs, cycle(colors), strict=False):
        draw_loss(left, run, color)
        draw_rotation(right, run, color)
    finish_loss(left)
    finish_rotation(right)
    figure.savefig(file, dpi=150)


def loss_picture(runs: Sequence[Run]) -> list[Figure]:
    """Training and evaluation losses of all runs in one picture."""
    return _overlaid(runs, draw_loss, finish_loss)


def rotation_picture(runs: Sequence[Run]) -> list[Figure]:
    """The mean angle of every run, its target and AdamW's prediction in one picture."""
    return _overlaid(runs, draw_rotation, finish_rotation)


def balance_picture(runs: Sequence[Run]) -> list[Figure]:
    """The ratio of fast to slow neurons of every run in one picture."""

    def draw(panel: Axes, run: Run, color: str) -> None:
        draw_line(panel, *_over_steps(run, "balance"), color=color, linewidth=1.8, label=text(run.name))

    def finish(panel: Axes) -> None:
        panel.axhline(1, color="black", linewidth=0.8, alpha=0.5)
        panel.set(xlabel="step", ylabel="90th / 10th percentile of the angles")
        if panel.get_ylim()[1] > 10:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        decorate(panel)

    return _overlaid(runs, draw, finish)


def angle_pictures(runs: Sequence[Run]) -> list[Figure]:
    """One picture a run: the angle of every layer over time, with target and AdamW's prediction."""

    def draw(panel: Axes, run: Run) -> None:
        _draw_layers(panel, run, lambda layer, first: layer["angle"] and layer["angle"][0])
        _draw_expected(panel, run)
        panel.set(ylabel="rotation per step (rad)")
        if panel.dataLim.y1 > 0:
            panel.set_yscale("log", nonpositive="mask")  # warmup begins at 0

    return _side_by_side(runs, draw)


def norm_pictures(runs: Sequence[Run]) -> list[Figure]:
    """One picture a run: the mean norm of every layer over time, relative to the first that was measured."""

    def draw(panel: Axes, run: Run) -> None:
        _draw_layers(panel, run, lambda layer, first: layer["norm"] and layer["norm"][0] / first["norm"][0])
        panel.set(ylabel="norm / norm at the first measured step")
        panel.ticklabel_format(axis="y", useOffset=False)
        low, high = panel.get_ylim()
        # Else the rounding errors of norms that are held would fill the picture.
        panel.set_ylim(min(low, 1 - 2e-3), max(high, 1 + 2e-3))

    return _side_by_side(runs, draw)


def layer_pictures(runs: Sequence[Run]) -> list[Figure]:
    """One picture a run: for every layer the mean angle over the measured steps, spread, target and prediction."""
    figures, panels = [], []
    for run in runs:
        names = layer_names(run)
        figure, (panel,) = new_figure(WIDTH, _rows_height(names))
        rows = range(len(names))
        means = [_mean(run, name, lambda layer: layer["angle"] and layer["angle"][0]) for name in names]
        spreads = [_mean(run, name, lambda layer: layer["angle"] and layer["angle"][1]) for name in names]
        predicted = _finite_mean(run.predictions)
        if predicted > 0:
            panel.axvline(predicted, label="AdamW's equilibrium", zorder=0, **PREDICTION)
        panel.errorbar(
            means, rows, xerr=spreads, fmt="o", markersize=3.5, color=COLORS[1], ecolor="#9cc3e3", label="measured"
        )
        targets = [_mean(run, name, lambda layer: layer["target"]) for name in names]
        if any(map(math.isfinite, targets)):
            panel.scatter(targets, rows, marker="|", s=40, color="black", label="target", zorder=3)
        panel.set(xlabel="rotation per step (rad)", ylim=(len(names) - 0.5, -0.5))
        panel.set_xlim(0, None)
        panel.ticklabel_format(axis="x", scilimits=(0, 0), useMathText=True)
        _name_rows(panel, names)
        decorate(panel, legend=False)
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        figures.append(figure)
        panels.append(panel)
    for panel in panels:
        panel.set_xlim(0, max(other.get_xlim()[1] for other in panels))
    return figures


def heat_pictures(runs: Sequence[Run]) -> list[Figure]:
    """One picture a run: layers by measured steps, colored by angle over target (or over the model's mean angle)."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedFormatter, FixedLocator

    figures = []
    for run in runs:
        names = layer_names(run)
        figure, (panel,) = new_figure(WIDTH, _rows_height(names))
        image = panel.imshow(
            [[ratio(record, name) for record in run.rotation] for name in names],
            aspect="auto",
            cmap=colormaps["RdBu_r"].with_extremes(bad="#d9d9d9"),
            norm=LogNorm(1 / HEAT_RANGE, HEAT_RANGE),
        )
        ticks = [0.25, 0.5, 1, 2, 4]
        bar = figure.colorbar(image, extend="both", pad=0.02, ticks=FixedLocator(ticks), aspect=30)
        bar.ax.yaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
        bar.ax.minorticks_off()
        has_target = any(record["target"] is not None for record in run.rotation)
        bar.set_label("angle / target" if has_target else "angle / model's mean angle", fontsize=8)
        shown = range(0, len(run.rotation), max(1, -(-len(run.rotation) // 7)))
        panel.set_xticks(list(shown), [str(run.rotation[place]["step"]) for place in shown])
        panel.set(xlabel="measured step")
        _name_rows(panel, names)
        panel.tick_params(length=2)
        figures.append(figure)
    return figures


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, beside each other."""
    require_matplotlib()
    # A Figure of its own draws with Agg and leaves pyplot, and with it the user's own figures and backend, alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def draw_line(panel: Axes, steps: Sequence[float], values: Sequence[float], **style: Any) -> None:
    """A line, which is a point where there is only one."""
    panel.plot(steps, values, marker="o" if len(steps) == 1 else "", markersize=4, **style)


def draw_loss(panel: Axes, run: Run, color: str) -> None:
    """The loss of every step as a pale line, its running average on top, and evaluations as points."""
    steps = [step for step, _ in run.losses]
    losses = [loss for _, loss in run.losses]
    draw_line(panel, steps, losses, color=color, alpha=0.25, linewidth=0.8)
    draw_line(panel, steps, running_average(losses), color=color, linewidth=1.8, label=text(run.name))
    if run.evaluations:
        panel.plot(*zip(*run.evaluations, strict=True), "o", color=color, markersize=4, markeredgecolor="white")


def finish_loss(panel: Axes) -> None:
    """Axes of a picture of losses."""
    panel.set(xlabel="step", ylabel="training loss")
    decorate(panel)


def draw_rotation(panel: Axes, run: Run, color: str) -> None:
    """The measured angle as a line and, where they are known, its target and AdamW's prediction as dashes on top."""
    draw_line(panel, *_over_steps(run, "rotation"), color=color, linewidth=1.8, label=text(run.name))
    _draw_expected(panel, run)


def finish_rotation(panel: Axes) -> None:
    """Axes of a picture of angles."""
    panel.set(xlabel="step", ylabel="rotation per step (rad, mean over neurons)", ylim=(0, None))
    panel.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    decorate(panel)


def decorate(panel: Axes, legend: bool = True) -> None:
    """What all panels with lines have in common."""
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    if legend and labels:
        once = dict(zip(labels, handles, strict=True))  # several runs have a target
        panel.legend(once.values(), once.keys(), frameon=False)


def running_average(values: Sequence[float]) -> list[float]:
    """Exponential running average of ``values``, without the pull towards 0 that it has at the start."""
    averages = []
    total = weight = 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        averages.append(total / weight)
    return averages


def ratio(record: Mapping[str, Any], name: str) -> float:
    """A layer's angle over its target, or over the model's mean angle where there is none; NaN where there is no angle.

    A layer at rest gives a tiny number rather than 0, which a logarithmic scale of colors could not show.
    """
    layer = record["layers"].get(name)
    if layer is None or layer["angle"] is None:
        return math.nan
    expected = record["rotation"] if layer["target"] is None else layer["target"]
    return max(layer["angle"][0] / expected, 1e-9) if expected else math.nan


def layer_names(run: Run) -> list[str]:
    """The layers of a run, in the model's order."""
    return list(dict.fromkeys(name for record in run.rotation for name in record["layers"]))


def short_names(names: Sequence[str]) -> list[str]:
    """Names of parameters without what they share: ``model.layers.0.mlp.up_proj.weight`` is ``0.mlp.up_proj``."""
    short = list(names)
    for shorten in (_without_ending, _without_stack, _without_front):
        shorter = shorten(short)
        if all(shorter) and len(set(shorter)) == len(set(names)):
            short = shorter
    return short


def text(name: str) -> str:
    """A name that matplotlib prints literally: ``$`` begins a formula, a leading ``_`` hides it from the legend."""
    return re.sub("^_", " _", name.replace("$", r"\$"))


def _without_ending(names: Sequence[str]) -> list[str]:
    """Without the word that says that it is a weight."""
    return [name.removesuffix(".weight") for name in names]


def _without_stack(names: Sequence[str]) -> list[str]:
    """Without the word before the first number, such as ``layers`` or ``h``."""
    return [re.sub(r"(?<![^.])(?!\d)[^.]+\.(?=\d+\.)", "", name, count=1) for name in names]


def _without_front(names: Sequence[str]) -> list[str]:
    """Without what is in front of the first number, if that is always the same, and of all names."""
    first, last = min(names, default=""), max(names, default="")
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = "".join(one for one, _ in alike).rpartition(".")[0] + "."
    fronts = {match[1] for name in names if (match := re.match(r"(.*?)(?<![^.])\d+\.", name))}
    front = fronts.pop() if len(fronts) == 1 else shared
    return [name.removeprefix(front if name.startswith(front) else shared) for name in names]


def _overlaid(
    runs: Sequence[Run], draw: Callable[[Axes, Run, str], None], finish: Callable[[Axes], None]
) -> list[Figure]:
    figure, (panel,) = new_figure(WIDTH, 3.6)
    for run, color in zip(runs, cycle(COLORS[1:] + COLORS[:1]), strict=False):
        draw(panel, run, color)
    finish(panel)
    return [figure]


def _side_by_side(runs: Sequence[Run], draw: Callable[[Axes, Run], None]) -> list[Figure]:
    """One picture a run, all with the same ranges."""
    figures, panels = [], []
    for run in runs:
        figure, (panel,) = new_figure(WIDTH, 3.6)
        draw(panel, run)
        panel.set(xlabel="step")
        decorate(panel)
        figures.append(figure)
        panels.append(panel)
    across, up = [panel.get_xlim() for panel in panels], [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_xlim(min(low for low, _ in across), max(high for _, high in across))
        panel.set_ylim(min(low for low, _ in up), max(high for _, high in up))
    return figures


def _draw_layers(panel: Axes, run: Run, value: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]) -> None:
    """A line for each layer, dark to light from the first to the last."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    names = layer_names(run)
    shades = [colormaps["viridis"](0.92 * place / max(len(names) - 1, 1)) for place in range(len(names))]
    for name, shade in zip(names, shades, strict=True):
        layers = [(record["step"], record["layers"].get(name)) for record in run.rotation]
        known = [(step, layer) for step, layer in layers if layer is not None and layer["norm"] is not None]
        values = [_number(value(layer, known[0][1])) for _, layer in known]
        draw_line(panel, [step for step, _ in known], values, color=shade, linewidth=0.9)
    if names:
        bar = panel.figure.colorbar(ScalarMappable(cmap=ListedColormap(shades)), ax=panel, pad=0.02, aspect=30)
        bar.set_ticks([0.02, 0.98], labels=["first", "last"], fontsize=8)
        bar.ax.set_ylabel("layer", fontsize=8, labelpad=-8)
        bar.ax.invert_yaxis()


def _draw_expected(panel: Axes, run: Run) -> None:
    """Target and prediction of a run over time."""
    steps = [record["step"] for record in run.rotation]
    if any(run.predictions):
        values = [_number(prediction) for prediction in run.predictions]
        draw_line(panel, steps, values, label="AdamW's equilibrium", **PREDICTION)
    if any(record["target"] is not None for record in run.rotation):
        draw_line(panel, *_over_steps(run, "target"), label="target", **TARGET)


def _over_steps(run: Run, quantity: str) -> tuple[list[int], list[float]]:
    return [record["step"] for record in run.rotation], [_number(record[quantity]) for record in run.rotation]


def _mean(run: Run, name: str, value: Callable[[Mapping[str, Any]], float | None]) -> float:
    layers = (record["layers"].get(name) for record in run.rotation)
    return _finite_mean([value(layer) for layer in layers if layer is not None])


def _finite_mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _number(value: float | None) -> float:
    """A number to draw; matplotlib leaves a gap for NaN."""
    return math.nan if value is None else value


def _rows_height(names: Sequence[str]) -> float:
    """Inches for a picture with a row for each layer; deep models get thinner rows, not endless pictures."""
    return min(max(1.6 + 0.15 * len(names), 2.6), 9.0)


def _name_rows(panel: Axes, names: Sequence[str]) -> None:
    """Names the rows, every other or every third only where they would overlap."""
    every = max(1, math.ceil(0.14 * len(names) / (_rows_height(names) - 1.4)))
    short = short_names(names)
    panel.set_yticks(list(range(0, len(names), every)), [text(name) for name in short[::every]], fontsize=8)
