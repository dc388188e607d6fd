"""What a run will do to neurons, from its hyperparameters and, where there is a model, from its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hf_rotational import equilibrium
from hf_rotational.neurons import PlannedParameter, plan
from hf_rotational.optim.config import RotationalConfig
from hf_rotational.optim.factory import RotationalOptimizerFactory
from hf_rotational.optim.optimizer import rms_of

Floats = NDArray[np.float64]

CLOSED_FORMS: Mapping[str, str] = MappingProxyType({"adamw": "adamw", "adam": "adamw", "sgd": "sgdm", "lion": "lion"})
"""Optimizer to the closed form of the angle that its rotational variant imposes; Adam's is AdamW's."""

SCHEDULES: Mapping[str, Callable[[Floats], Floats]] = MappingProxyType(
    {
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: (1 + np.cos(np.pi * progress)) / 2,
        "constant": np.ones_like,
    }
)
"""Learning rate relative to its peak, by progress after warmup, from 0 to 1."""

PERCENTILES: Mapping[str, float] = MappingProxyType({"5th percentile": 5, "median": 50, "95th percentile": 95})
"""Of layers, sorted by their weights' size."""

MAX_KINDS = 30
"""Rows of layers that a reader still takes in."""


@dataclass(frozen=True)
class Run:
    """The hyperparameters of a training run.

    Raises:
        ValueError: for a value out of range that the closed forms do not look at.
    """

    optim: str
    """A key of :data:`CLOSED_FORMS`."""
    lr: float
    steps: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    schedule: str = "linear"
    """A key of :data:`SCHEDULES`."""
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"Invalid lr: {self.lr} (must be a finite number > 0)")
        if self.steps < 1:
            raise ValueError(f"Invalid steps: {self.steps} (must be at least 1)")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"Invalid warmup_steps: {self.warmup_steps} (must be from 0 to steps, {self.steps})")

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the optimizer takes besides learning rate and weight decay."""
        return {"momentum": self.momentum} if self.optim == "sgd" else {"betas": self.betas}

    def relative_lr(self) -> Floats:
        """Learning rate of every step over the peak, as the schedules of Transformers have it."""
        step, warmup = np.arange(self.steps), self.warmup_steps
        falling = SCHEDULES[self.schedule]((step - warmup) / max(1, self.steps - warmup))
        return np.where(step < warmup, step / max(1, warmup), falling)


@dataclass(frozen=True)
class Prediction:
    """The equilibrium of a run's hyperparameters. ``None`` where it depends on the gradient."""

    run: Run
    angle_weight_decay: float
    """Weight decay that it is for: the run's or, if that is 0, ``RotationalConfig``'s."""
    rotation: float
    """Angle in radians per step at the peak learning rate."""
    total_rotation: float
    """Sum of the angles of all steps."""
    norm: float | None
    """Norm of a neuron over the root of its fan-in."""
    half_life: float | None
    """In steps at the peak learning rate."""
    half_lives: float | None
    """How many pass in the run."""
    lr_sum: float
    """Sum over the steps of the learning rate relative to its peak."""

    @property
    def lion_memory(self) -> float | None:
        """Lion's ``lr weight_decay / (1-b2)``, which its closed form needs to be small."""
        run = self.run
        return run.lr * self.angle_weight_decay / (1 - run.betas[1]) if run.optim == "lion" else None


def predict(run: Run) -> Prediction:
    """The equilibrium, at the peak learning rate and over the run.

    Raises:
        ValueError: for a hyperparameter out of range.
    """
    weight_decay = run.weight_decay or RotationalConfig().angle_weight_decay_of(f"rotational_{run.optim}")
    relative_lr = run.relative_lr()
    sizes = {} if run.optim == "sgd" else {"fan_in": 1}

    form = getattr(equilibrium, CLOSED_FORMS[run.optim])
    peak, course = (
        form(lr=lr, weight_decay=weight_decay, **sizes, **run.hyperparameters) for lr in (run.lr, run.lr * relative_lr)
    )
    plain_adam = run.optim == "adam"  # free-running, it has an equilibrium of its own, which depends on the gradient
    return Prediction(
        run=run,
        angle_weight_decay=weight_decay,
        rotation=peak.rotation,
        total_rotation=float(course.rotation.sum()),
        norm=None if plain_adam else peak.norm,
        half_life=None if plain_adam else peak.half_life,
        half_lives=None if plain_adam else float((1 / course.half_life).sum()),
        lr_sum=float(relative_lr.sum()),
    )


@dataclass(frozen=True)
class Layer:
    """One rotating weight, or the median or another percentile over several."""

    name: str
    count: int
    """How many weights; 0 for a percentile over all."""
    fan_in: float
    rms: float
    """Root mean square of the entries."""
    norm: float
    """Root mean square norm of the neurons."""
    over_equilibrium: float | None
    """Present norm over equilibrium norm; ``None`` where that depends on the gradient."""
    adamw: float
    """Angle in radians per step by which AdamW would turn it at the start, if its updates were independent."""


@dataclass(frozen=True)
class Layers:
    """What a model's weights say about a run."""

    model: str
    """Class name."""
    count: int
    """How many weights rotate."""
    kinds: tuple[Layer, ...]
    """Medians over the weights that differ only in the number of their layer."""
    percentiles: tuple[Layer, Layer, Layer]
    """5th, 50th and 95th percentile over all, each quantity for itself, in the order of ``rms``."""
    fastest: Layer
    """The one that AdamW turns fastest at the start."""
    slowest: Layer
    """The one that it turns slowest."""
    match: float
    """Target angle of ``rotation="match"`` at the peak learning rate."""
    match_weight_decay: float
    """Weight decay that gives ``rotation="equilibrium"`` the same angle."""

    @property
    def median(self) -> Layer:
        """Over all."""
        return self.percentiles[1]


def study_layers(model: nn.Module, prediction: Prediction) -> Layers:
    """Compares a run's equilibrium with the weights of a model as they are.

    Raises:
        ValueError: if nothing in the model rotates, or a hyperparameter is out of range.
    """
    run = prediction.run
    optimizer = RotationalOptimizerFactory()(
        model, optim=f"rotational_{run.optim}", lr=run.lr, rotation="match", **run.hyperparameters
    )
    match = next(optimizer.target_rotation(group) for group in optimizer.param_groups if group["rotational"])
    entries = plan(model).rotating
    layers = [_layer(entry, prediction) for entry in entries]
    grouped = _grouped(layers, [_kind(layer.name) for layer in layers])
    if len(grouped) > MAX_KINDS:
        grouped = _grouped(layers, [entry.module_type for entry in entries])
    low, median, high = (_percentile(layers, f"all: {name}", at) for name, at in PERCENTILES.items())
    return Layers(
        model=type(model).__name__,
        count=len(layers),
        kinds=tuple(grouped),
        percentiles=(low, median, high),
        fastest=max(layers, key=lambda layer: layer.adamw),
        slowest=min(layers, key=lambda layer: layer.adamw),
        match=match,
        match_weight_decay=equilibrium.inverse.weight_decay(
            CLOSED_FORMS[run.optim], rotation=match, lr=run.lr, **run.hyperparameters
        ),
    )


def _layer(entry: PlannedParameter, prediction: Prediction) -> Layer:
    parameter, run = entry.parameter, prediction.run
    fan_in = parameter.numel() / math.prod(parameter.shape[dim] for dim in entry.neuron_dims)
    (rms,) = rms_of([parameter])
    # Run with another optimizer, AdamW is compared with at its own default betas.
    betas = {"betas": run.betas} if run.optim in ("adamw", "adam") else {}
    update_rms = equilibrium.adamw(lr=run.lr, weight_decay=0.0, fan_in=1, **betas).update_rms
    assert update_rms is not None
    return Layer(
        name=entry.name.removesuffix(".weight"),
        count=1,
        fan_in=fan_in,
        rms=rms,
        norm=rms * math.sqrt(fan_in),
        over_equilibrium=None if prediction.norm is None else rms / prediction.norm,
        adamw=update_rms / rms,
    )


def _kind(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _grouped(layers: list[Layer], kinds: list[str]) -> list[Layer]:
    groups: dict[str, list[Layer]] = {}
    for layer, kind in zip(layers, kinds, strict=True):
        groups.setdefault(kind, []).append(layer)
    return [_percentile(group, kind, 50, count=len(group)) for kind, group in groups.items()]


def _percentile(layers: list[Layer], name: str, at: float, count: int = 0) -> Layer:
    """A percentile over layers; AdamW's angle goes the other way, as it is the inverse of ``rms``."""

    def of(values: list[float]) -> float:
        return float(np.percentile(values, at))

    ratios = [layer.over_equilibrium for layer in layers if layer.over_equilibrium is not None]
    return Layer(
        name=name,
        count=count,
        fan_in=of([layer.fan_in for layer in layers]),
        rms=of([layer.rms for layer in layers]),
        norm=of([layer.norm for layer in layers]),
        over_equilibrium=of(ratios) if ratios else None,
        adamw=float(np.percentile([layer.adamw for layer in layers], 100 - at)),
    )
