"""`hf-rotational predict`: how far neurons will turn in a run, before it is run."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hf_rotational.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from hf_rotational.prediction import Layers, Prediction

NAMES = {"adamw": "AdamW", "adam": "Adam with L2", "sgd": "SGD", "lion": "Lion"}
SETTLED = 4  # half-lives after which a norm is said to have settled
SCHEDULES = ("linear", "cosine", "constant")
WIDTH = 100  # what the table of layers needs, where the terminal is narrower or there is none

DESCRIPTION = (
    "Prints the equilibrium of an optimizer's hyperparameters (angle per step and over the run, norm, half-life) and, "
    "with a model, how fast AdamW would turn its layers at the start, next to what rotational optimizers do. "
    "Hyperparameters that are not given are the Trainer's defaults."
)


def register(commands: Any) -> None:
    """Adds the command to `commands`, which `ArgumentParser.add_subparsers` returned."""
    parser: ArgumentParser = commands.add_parser(
        "predict", help="show how far neurons will turn in a run, before it is run", description=DESCRIPTION
    )
    parser.add_argument(
        "--optim",
        choices=(*NAMES, *(f"rotational_{name}" for name in NAMES)),
        default="adamw",
        metavar="NAME",
        help=f"{', '.join(NAMES)}, or one of these with rotational_ before it, which is the same here",
    )
    parser.add_argument(
        "--lr", "--learning_rate", type=float, required=True, default=SUPPRESS, help="peak learning rate"
    )
    parser.add_argument(
        "--weight_decay", type=float, default=0.0, help="weight decay; at 0 the angle uses another, as the Trainer does"
    )
    parser.add_argument(
        "--steps", "--max_steps", type=int, required=True, default=SUPPRESS, help="optimizer steps of the run"
    )
    parser.add_argument(
        "--schedule",
        "--lr_scheduler_type",
        choices=SCHEDULES,
        default="linear",
        help="how the learning rate falls after warmup",
    )
    parser.add_argument("--warmup_steps", type=int, default=0, help="steps in which it rises from 0")
    parser.add_argument("--adam_beta1", type=float, default=0.9, help="of AdamW, Adam and Lion")
    parser.add_argument("--adam_beta2", type=float, default=0.999, help="of AdamW, Adam and Lion")
    parser.add_argument("--momentum", type=float, default=0.0, help="of SGD")
    parser.add_argument("--model", help="a model on the Hub, or a folder with a model; its weights are loaded")
    parser.add_argument(
        "--architecture",
        metavar="CLASS",
        help="its class, such as BertForSequenceClassification; by default the one the config names",
    )
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> None:
    """Carries the command out."""
    from rich.console import Console

    from hf_rotational.prediction import Run, predict, study_layers

    optim = arguments.optim.removeprefix("rotational_")
    try:
        prediction = predict(
            Run(
                optim=optim,
                lr=arguments.lr,
                weight_decay=arguments.weight_decay,
                betas=(arguments.adam_beta1, arguments.adam_beta2),
                momentum=arguments.momentum,
                steps=arguments.steps,
                schedule=arguments.schedule,
                warmup_steps=arguments.warmup_steps,
            )
        )
        if arguments.architecture and not arguments.model:
            raise UserError("--architecture is of --model, which is not given")
        layers = study_layers(_load(arguments.model, arguments.architecture), prediction) if arguments.model else None
    except ValueError as error:
        raise UserError(str(error)) from None
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    console.print(_heading(prediction))
    console.print(_equilibrium_table(prediction))
    if layers is not None:
        console.print(_angle_table(prediction, layers))
        console.print(_layer_table(prediction, layers))
    for sentence in advice(prediction, layers):
        console.print(fill(sentence, WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))


def _load(name: str, architecture: str | None) -> Any:
    from hf_rotational.commands.plan import build_model
    from hf_rotational.demo.model import quiet

    with quiet():
        return build_model(name, architecture, weights=True)


def _heading(prediction: Prediction) -> str:
    run = prediction.run
    extra = f"momentum {run.momentum:g}" if run.optim == "sgd" else f"betas {run.betas[0]:g}, {run.betas[1]:g}"
    warmup = f"{run.warmup_steps:,} warmup steps" if run.warmup_steps else "no warmup"
    return (
        f"{NAMES[run.optim]}, learning rate {run.lr:g}, weight decay {run.weight_decay:g}, {extra}\n"
        f"{run.steps:,} steps, {run.schedule} schedule, {warmup}\n"
    )


def _equilibrium_table(prediction: Prediction) -> Table:
    title = f"Equilibrium at weight decay {prediction.angle_weight_decay:g}"
    table = _table(title, "", "at the peak learning rate", ">over the run")
    table.add_row("rotation", f"{prediction.rotation:.3g} rad per step", f"{prediction.total_rotation:.3g} rad")
    table.add_row(
        "norm",
        "depends on the gradient"
        if prediction.norm is None
        else f"{prediction.norm:.3g} sqrt(fan-in), which is rms(weight) {prediction.norm:.3g}",
        "",
    )
    if prediction.half_life is None:
        table.add_row("half-life", "depends on the gradient", "")
    else:
        table.add_row("half-life", f"{prediction.half_life:,.0f} steps", f"{prediction.half_lives:.2g} half-lives pass")
    return table


def _angle_table(prediction: Prediction, layers: Layers) -> Table:
    table = _table("How far a neuron turns (rad)", "", ">per step, at the peak", ">over the run")
    for name, angle, total in (
        ("AdamW at the start: the median layer", layers.median.adamw, layers.median.adamw * prediction.lr_sum),
        ('rotational, rotation="equilibrium"', prediction.rotation, prediction.total_rotation),
        ('rotational, rotation="match"', layers.match, layers.match * prediction.lr_sum),
    ):
        table.add_row(name, f"{angle:.2e}", f"{total:.3g}")
    return table


def _layer_table(prediction: Prediction, layers: Layers) -> Table:
    table = _table(
        f"{layers.model}: {layers.count} weights rotate",
        *("weights (medians)", ">count", ">fan-in", ">rms", ">norm", ">ratio", ">AdamW", ">run"),
    )
    for layer in (*layers.kinds, *layers.percentiles):
        if layer is layers.percentiles[0]:
            table.add_section()
        table.add_row(
            layer.name,
            f"{layer.count}" if layer.count else "",
            f"{layer.fan_in:.4g}",
            f"{layer.rms:.2g}",
            f"{layer.norm:.2g}",
            "" if layer.over_equilibrium is None else f"{layer.over_equilibrium:.2g}",
            f"{layer.adamw:.2e}",
            f"{layer.adamw * prediction.lr_sum:.2g}",
        )
    table.caption = (
        "ratio: norm over equilibrium norm; AdamW: at the start and the peak learning rate, rad per step, were its "
        "updates independent; run: rad over the run, at that norm"
    )
    return table


def _table(title: str, *columns: str) -> Table:
    """An empty table; columns whose title starts with `>` are aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    return table


def advice(prediction: Prediction, layers: Layers | None) -> Sequence[str]:
    """What a user should know about these numbers, in plain sentences."""
    return (*_about_equilibrium(prediction), *(_about_layers(prediction, layers) if layers is not None else ()))


def _about_equilibrium(prediction: Prediction) -> list[str]:
    run, sentences = prediction.run, []
    if run.weight_decay == 0:
        sentences.append(
            f"Equilibrium is never reached in this run: {NAMES[run.optim]} has none without weight decay. Rotational "
            f"optimizers then use weight decay {prediction.angle_weight_decay:g} for the angle, as the Trainer, the "
            "factory and the script flag do (angle_weight_decay). The numbers are for that one."
        )
    elif prediction.half_lives is not None and prediction.half_life is not None:
        sentences.append(_about_half_life(prediction, prediction.half_life, prediction.half_lives))
    if run.optim == "adam":
        sentences.append(
            "Adam with L2 settles to an angle that depends on each neuron's gradient. The angle here is AdamW's, which "
            "rotational_adam imposes."
        )
    if prediction.lion_memory is not None and prediction.lion_memory >= 0.1:
        sentences.append(
            "Lion's closed form needs lr * weight_decay well below 1 - beta2. Here it is "
            f"{prediction.lion_memory:.2g} times that: {NAMES[run.optim]} itself would turn faster, at a smaller norm."
        )
    return sentences


def _about_half_life(prediction: Prediction, half_life: float, passing: float) -> str:
    run = prediction.run
    compared = f"the half-life is {half_life:,.0f} steps and the run has {run.steps:,}"
    distance = f"of the {'fourth power of the norm' if run.optim == 'sgd' else 'squared norm'}'s distance from it"
    if passing < 1:
        return (
            f"Equilibrium is never reached in this run: {compared}, so {0.5**passing:.1%} {distance} is left at the "
            f"end. {NAMES[run.optim]} itself turns neurons as fast as the norm they start with lets it, and its weight "
            "decay hardly matters. A rotational optimizer turns by the angle it is told: with "
            'rotation="equilibrium" weight decay is a way to set that angle, no more.'
        )
    imposed = "A rotational optimizer has the angle from the first step."
    if passing < SETTLED:
        return (
            f"Equilibrium is approached in this run, not reached: {compared}, so {0.5**passing:.0%} {distance} is left "
            f"at the end. {imposed}"
        )
    return (
        f"Equilibrium is reached in this run, after about {SETTLED * half_life:,.0f} steps at the peak learning rate: "
        f"{SETTLED} half-lives, which leave {0.5**SETTLED:.0%} {distance}. {imposed}"
    )


def _about_layers(prediction: Prediction, layers: Layers) -> list[str]:
    run, fastest, slowest = prediction.run, layers.fastest, layers.slowest
    ratio = prediction.rotation / layers.match
    sentences = [
        f"At the start AdamW would turn {fastest.name} {fastest.adamw / slowest.adamw:.1f} times as fast as "
        f"{slowest.name}. A rotational optimizer turns all alike.",
        f'At the peak learning rate rotation="equilibrium" turns {max(ratio, 1 / ratio):.2g} times '
        f'{"faster" if ratio > 1 else "slower"} than rotation="match", the angle that AdamW is measured to settle to '
        f"when fine-tuning at this learning rate. Weight decay {layers.match_weight_decay:.2g} would make them equal; "
        "match needs none.",
    ]
    if run.schedule != "constant" or run.warmup_steps:
        sentences.append(
            'With the schedule, rotation="equilibrium" goes as the root of the learning rate, AdamW and '
            'rotation="match" in proportion to it. Sums over the run are of the angles of all steps, whatever their '
            "directions: a neuron ends less far from where it started."
        )
    return sentences
