"""What monitored runs looked like: one HTML file that needs nothing else, and its pictures as PNGs."""

from __future__ import annotations

import math
import statistics
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_rotational.monitor import plots
from hf_rotational.monitor.advice import Adviser, holds_norms
from hf_rotational.monitor.plots import Run, layer_names, ratio, running_average, short_names
from hf_rotational.monitor.runs import MonitoredRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE_NAME = "rotation-report.html"
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
BRIEF_TYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Section:
    """A kind of picture: one of all runs together, or one of each."""

    name: str
    """In the PNGs' file names."""
    title: str
    caption: str
    draw: Callable[[Sequence[Run]], list[Figure]]
    describe: Callable[[Run], str]
    """What one run's part of the picture shows, for those who do not see it."""
    each: bool = True
    """Whether every run has a picture of its own."""
    shows: Callable[[Run], Sequence[Any]] = attrgetter("rotation")
    """What the picture shows of a run; runs that have none of it are left out."""


def write_report(runs: Sequence[MonitoredRun], output: Path) -> list[Path]:
    """Draws the runs, and writes the report and its pictures into the folder ``output``.

    Returns:
        The files written, the report first.

    Raises:
        ImportError: without matplotlib.
        OSError: if the folder cannot be written to.
    """
    plots.require_matplotlib()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    output.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    sections = []
    for section in SECTIONS:
        drawn = [run.run for run in runs if section.shows(run.run)]
        if drawn:
            shown = _save(section, drawn, output)
            pictures.extend(file for file, _, _ in shown)
            sections.append((section, [(alt, title, _inlined(file)) for file, alt, title in shown]))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(TEMPLATE.name).render(
        names=[run.run.name for run in runs],
        problems=[problem for run in runs for problem in run.problems],
        advice=[(run.run.name, sentence) for run in runs for sentence in advice(run)],
        summary=_table([summary(run) for run in runs]),
        sections=sections,
        settings=_table([settings(run) for run in runs]),
        layers=[(run.run.name, layer_rows(run)) for run in runs if run.run.rotation],
    )
    report = output / FILE_NAME
    report.write_text(html, encoding="utf-8")
    return [report, *pictures]


def advice(monitored: MonitoredRun) -> list[str]:
    """What the monitor has said, or would have, of these steps."""
    sentences: list[str] = []
    parameters = monitored.header.get("parameters", {}).values()
    low_precision = any(parameter.get("dtype") in BRIEF_TYPES for parameter in parameters)
    held = holds_norms(monitored.header.get("settings", {}))
    adviser = Adviser(sentences.append, low_precision, holds_norms=held)
    for record in monitored.run.rotation:
        adviser.look(dict(record))
    return sentences


def summary(monitored: MonitoredRun) -> dict[str, str]:
    """A run in a few numbers."""
    run = monitored.run
    moving = [record for record in run.rotation if record["rotation"] and record["learning_rate"]]
    to_target = [record["rotation"] / record["target"] for record in moving if record["target"]]
    predictions = dict(zip((record["step"] for record in run.rotation), run.predictions, strict=False))
    to_prediction = [
        record["rotation"] / predicted for record in moving if (predicted := predictions.get(record["step"]))
    ]
    first, last = _ends(run)
    norms = [abs(last[name]["norm"][0] / layer["norm"][0] - 1) for name, layer in first.items() if name in last]
    return {
        "optimizer": str(monitored.header.get("optimizer", "")),
        "measured steps": f"{len(run.rotation)}, up to step {run.rotation[-1]['step']}" if run.rotation else "",
        "mean rotation (rad per step)": _median([record["rotation"] for record in moving], "{:.3g}"),
        "rotation / target": _median(to_target, "{:.2f}"),
        "rotation / AdamW's equilibrium": _median(to_prediction, "{:.2f}"),
        "balance": _median([record["balance"] for record in moving if record["balance"]], "{:.2f}"),
        "largest change of a layer's norm": f"{max(norms):.2%}" if norms else "",
        "training loss at the end": f"{_average_losses(run)[-1]:.4g}" if run.losses else "",
        "evaluation loss at the end": f"{run.evaluations[-1][1]:.4g}" if run.evaluations else "",
    }


def settings(monitored: MonitoredRun) -> dict[str, str]:
    """What a run was told, as far as the header says."""
    header = monitored.header
    names = ("model", "optimizer", "optim", "warmup_steps", "max_steps")
    own = {name: header[name] for name in names if name in header}
    measured = {"measured every": f"{header['every']} steps"} if "every" in header else {}
    parameters = {"measured parameters": len(header["parameters"])} if "parameters" in header else {}
    values = {**own, **header.get("settings", {}), **measured, **parameters}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def layer_rows(monitored: MonitoredRun) -> list[dict[str, str]]:
    """The table of layers: means over the measured steps, and norms at both ends."""
    run, parameters = monitored.run, monitored.header.get("parameters", {})
    names = layer_names(run)
    first, last = _ends(run)
    rows = []
    for name, short in zip(names, short_names(names), strict=True):
        layers = [record["layers"][name] for record in run.rotation if name in record["layers"]]
        relative = _median_ratio(run, name)
        rows.append(
            {
                "layer": short,
                "shape": " × ".join(map(str, parameters.get(name, {}).get("shape", ()))),
                "angle": _mean_of(layer["angle"] and layer["angle"][0] for layer in layers),
                "spread": _mean_of(layer["angle"] and layer["angle"][1] for layer in layers),
                "relative": "" if relative is None else f"{relative:.2f}",
                "update": _mean_of(layer["relative_update"] and layer["relative_update"][0] for layer in layers),
                "start": f"{first[name]['norm'][0]:.4g}" if name in first else "",
                "end": f"{last[name]['norm'][0]:.4g}" if name in last else "",
            }
        )
    return rows


def _save(section: Section, runs: Sequence[Run], output: Path) -> list[tuple[Path, str, str]]:
    """Draws a section's pictures; returns file, description and title of each."""
    figures = section.draw(runs)
    saved = []
    for place, figure in enumerate(figures):
        of = [runs[place]] if section.each else runs
        number = f"-{place + 1}" if len(figures) > 1 else ""
        file = output / f"rotation-{section.name}{number}.png"
        figure.savefig(file, dpi=150)
        alt = f"{section.title}. " + " ".join(f"{run.name}: {section.describe(run)}." for run in of)
        saved.append((file, alt, runs[place].name if section.each else ""))
    return saved


def _inlined(file: Path) -> str:
    return "data:image/png;base64," + b64encode(file.read_bytes()).decode()


def _table(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str], bool]]:
    """Rows of a table with a column for each run: name, values, whether they differ. Empty rows are left out."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name) or "–" for column in columns]) for name in names]
    return [(name, values, len(set(values)) > 1) for name, values in rows if set(values) != {"–"}]


def _ends(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """For every layer its first and its last measurement."""
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for record in run.rotation:
        for name, layer in record["layers"].items():
            if layer["norm"] is not None:
                first.setdefault(name, layer)
                last[name] = layer
    return first, last


def _median_ratio(run: Run, name: str) -> float | None:
    ratios = [value for record in run.rotation if math.isfinite(value := ratio(record, name))]
    return statistics.median(ratios) if ratios else None


def _median(values: Sequence[float], form: str) -> str:
    return form.format(statistics.median(values)) if values else ""


def _mean_of(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.3g}" if known else ""


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_plain, value)) if isinstance(value, list) else str(value)


def _average_losses(run: Run) -> list[float]:
    return running_average([loss for _, loss in run.losses])


def _range(values: Iterable[float | None], form: str) -> str:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return f"{form.format(min(known))} to {form.format(max(known))}" if known else "unknown"


def _describe_loss(run: Run) -> str:
    averages = _average_losses(run)
    return f"from {averages[0]:.3g} to {averages[-1]:.3g}" if averages else "no training loss"


def _describe_rotation(run: Run) -> str:
    measured = _range((record["rotation"] for record in run.rotation), "{:.2g}")
    target = _range((record["target"] for record in run.rotation), "{:.2g}")
    return f"{measured} radians per step, " + ("no target" if target == "unknown" else f"target {target}")


def _describe_balance(run: Run) -> str:
    return f"ratio {_range((record['balance'] for record in run.rotation), '{:.2g}')}"


def _describe_layers(run: Run) -> str:
    names = layer_names(run)
    medians = {name: value for name in names if (value := _median_ratio(run, name)) is not None}
    if not medians:
        return f"{len(names)} layers, none of which turned"
    low, high = min(medians, key=lambda name: medians[name]), max(medians, key=lambda name: medians[name])
    has_target = any(record["target"] is not None for record in run.rotation)
    return (
        f"{len(names)} layers; relative to {'the target' if has_target else 'the mean of the model'} slowest {low} "
        f"({medians[low]:.2f}), fastest {high} ({medians[high]:.2f})"
    )


def _describe_norms(run: Run) -> str:
    first, last = _ends(run)
    changes = (last[name]["norm"][0] / layer["norm"][0] for name, layer in first.items())
    return f"last over first norm {_range(changes, '{:.4f}')}"


SECTIONS = (
    Section(
        "loss",
        "Loss",
        "Training loss: pale as logged, bold its running average. Points: loss on the evaluation set.",
        plots.loss_picture,
        _describe_loss,
        each=False,
        shows=lambda run: run.losses or run.evaluations,
    ),
    Section(
        "mean",
        "Rotation of the model",
        "Angle by which neurons turn in a step, mean over all of them. Dashed: the target the optimizer aims at. "
        "Dotted: the angle at which AdamW would settle at this step's learning rate and weight decay.",
        plots.rotation_picture,
        _describe_rotation,
        each=False,
    ),
    Section(
        "balance",
        "Balance",
        "90th over 10th percentile of the angles of all neurons in a step. At 1, all learn at one rate.",
        plots.balance_picture,
        _describe_balance,
        each=False,
    ),
    Section(
        "angles",
        "Rotation of every layer over time",
        "One line a layer, mean over its neurons, dark to light from the first layer to the last.",
        plots.angle_pictures,
        _describe_layers,
    ),
    Section(
        "layers",
        "Rotation layer by layer",
        "Means over the measured steps; bars span one standard deviation over the neurons of a layer to either side.",
        plots.layer_pictures,
        _describe_layers,
    ),
    Section(
        "heat",
        "Layers by steps",
        "Angle of each layer over its target or, where the optimizer has none, over the mean angle of the model at "
        "that step. White: as it should be; red: faster; blue: slower; gray: not known.",
        plots.heat_pictures,
        _describe_layers,
    ),
    Section(
        "norms",
        "Norms",
        "Mean norm of the neurons of every layer, relative to the first that was measured.",
        plots.norm_pictures,
        _describe_norms,
    ),
)
"""The pictures of a report, in order."""
