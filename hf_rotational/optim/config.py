"""What a user may set about rotation, in one place: the dataclass, and how it reads from strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from hf_rotational.optim.groups import check_rotation
from hf_rotational.optim.inner import check_non_negative

ANGLE_WEIGHT_DECAYS: Mapping[str, float] = MappingProxyType(
    {"rotational_adamw": 0.1, "rotational_adam": 0.1, "rotational_lion": 0.5, "rotational_sgd": 1e-4}
)
"""Value of ``optim`` to what ``RotationalConfig.angle_weight_decay`` is by default (docs/evidence.md)."""


@dataclass(frozen=True)
class RotationalConfig:
    """Settings of the rotational update for a whole model. Round-trips through ``to_dict`` and ``from_dict``.

    Raises:
        ValueError: for a value out of range (what the optimizer itself checks, it checks when it is built).
    """

    rotation: str | float = "equilibrium"
    """Target angle: ``"equilibrium"``, ``"match"`` or radians per step at the peak learning rate."""
    angle_weight_decay: float | None = None
    """Weight decay that sets the ``"equilibrium"`` angle. ``None``: the training's own or, where that is 0, the
    Trainer's default, at which the angle would be 0, what suits the optimizer: 0.1 for AdamW and Adam, 0.5 for Lion and
    1e-4 for SGD. Parameters that do not rotate have the training's own in any case."""
    update_norm_decay: float = 0.9
    """Decay of the running average of the update's size."""
    rotational_eps: float = 1e-8
    """Added to the update's size before dividing by it."""
    centering: str = "none"
    """``"none"``, ``"updates"``, ``"weights"`` or ``"learned"``."""
    granularity: str = "neuron"
    """``"neuron"`` or ``"tensor"``."""
    rounding: str = "auto"
    """Of 16-bit parameters: ``"nearest"``, ``"kahan"`` or ``"stochastic"``; ``"auto"`` is kahan for models that have
    such parameters, as checkpoints saved in bfloat16 do unless they are loaded in float32."""
    transient_correction: bool = False
    """Whether the first steps, whose updates are larger or smaller than later ones, are brought to the target angle."""
    gains: str = "fixed"
    """Norms of neurons: ``"fixed"`` or ``"learned"``."""
    gain_lr_multiplier: float = 1.0
    """Factor on the learning rate for learned gains and means."""
    gain_weight_decay: float = 0.0
    """Weight decay of learned gains and means."""
    backend: str = "auto"
    """``"auto"``, ``"fused"``, ``"eager"`` or ``"foreach"``."""
    include: tuple[str, ...] = ()
    """Regular expressions of parameter names that rotate though the plan would leave them out."""
    exclude: tuple[str, ...] = ()
    """Regular expressions of parameter names that do not rotate."""
    embeddings: bool = False
    """Whether embeddings, and heads tied to them, rotate."""
    multipliers: Mapping[str, float] | Sequence[str] = dataclasses.field(default_factory=dict)
    """Regular expressions of parameter names to factors on the target angle; the last that matches counts. A list of
    ``"PATTERN=FACTOR"``, as the command line has it, is read too."""

    def __post_init__(self) -> None:
        check_rotation(self.rotation)
        if self.angle_weight_decay is not None:
            check_non_negative("angle_weight_decay", self.angle_weight_decay)
        for name in ("include", "exclude"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not isinstance(self.multipliers, Mapping):
            object.__setattr__(self, "multipliers", parse_multipliers(self.multipliers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RotationalConfig:
        """Builds a config from plain values.

        Raises:
            ValueError: for a key that is not a setting; lists the settings.
        """
        check_keys("rotational setting", values, cls.names())
        return cls(**values)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the settings."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def angle_weight_decay_of(self, optim: str) -> float:
        """``angle_weight_decay`` with the optimizer of that name."""
        return ANGLE_WEIGHT_DECAYS[optim] if self.angle_weight_decay is None else self.angle_weight_decay

    def optimizer_options(self) -> dict[str, Any]:
        """The settings that are keyword arguments of the optimizer."""
        others = {"angle_weight_decay", *self.plan_options()}
        return {name: value for name, value in vars(self).items() if name not in others}

    def plan_options(self) -> dict[str, Any]:
        """The settings that are keyword arguments of the plan."""
        return {name: getattr(self, name) for name in ("include", "exclude", "embeddings", "multipliers")}


def parse_optim_args(text: str | None) -> dict[str, str]:
    """Reads the Trainer's ``optim_args``: ``"rotation=match,centering=updates"``.

    Raises:
        ValueError: for a part that is not ``key=value``.
    """
    pairs = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise ValueError(f"Invalid optim_args: {part!r} in {text!r} (must be key=value pairs, separated by commas)")
        pairs[key] = value
    return pairs


def parse_settings(values: Mapping[str, str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Gives settings that came as strings the types of their defaults.

    Raises:
        ValueError: for a key without a default, listing those that have one, or a value that does not read as its type.
    """
    check_keys("optim_args key", values, tuple(defaults))
    return {name: _parse(name, value, defaults[name]) for name, value in values.items()}


def parse_multipliers(pairs: Sequence[str]) -> dict[str, float]:
    """Reads ``["PATTERN=FACTOR", ...]``.

    Raises:
        ValueError: for one that does not read so, naming it.
    """
    multipliers = {}
    for pair in [pairs] if isinstance(pairs, str) else pairs:
        pattern, _, factor = pair.rpartition("=")
        try:
            multipliers[pattern] = float(factor if pattern else "")
        except ValueError:
            raise ValueError(f"Invalid multipliers: {pair!r} (must be PATTERN=FACTOR, such as 'mlp=0.5')") from None
    return multipliers


def parse_rotation(value: str | float) -> str | float:
    """A rotation as the command line has it: a number where it reads as one, else the name of a rule."""
    try:
        return float(value)
    except ValueError:
        return value


def check_keys(what: str, given: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    """Raises ``ValueError`` for the first key that is not valid, listing those that are."""
    for key in given:
        if key not in valid:
            raise ValueError(f"Unknown {what}: {key!r} (valid: {', '.join(valid)})")


def _parse(name: str, value: str, default: Any) -> Any:
    if name == "rotation":
        return parse_rotation(value)
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"Invalid {name}: {value!r} (must be true or false)")
        return value.lower() == "true"
    if isinstance(default, float) or name == "angle_weight_decay":
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"Invalid {name}: {value!r} (must be a number)") from None
    return value
