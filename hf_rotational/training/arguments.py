"""Training arguments with the settings of the rotational update."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_rotational.optim.config import RotationalConfig, parse_rotation
from hf_rotational.optim.factory import OPTIMIZERS, factory_settings, optim_name

_DEFAULT = RotationalConfig()


@dataclass
class RotationalTrainingArguments(TrainingArguments):
    """``TrainingArguments`` whose optimizer is rotational unless said otherwise. Warmup stays 0, the Trainer's default.

    Example::

        args = RotationalTrainingArguments(output_dir="out", learning_rate=5e-5)

    Raises:
        ValueError: for a setting out of range or an unknown ``optim_args`` key, when it is constructed.
    """

    optim: str = field(
        default="rotational_adamw",
        metadata={"help": f"A rotational optimizer ({', '.join(OPTIMIZERS)}) or one of the Trainer's own."},
    )
    rotation: str = field(
        default=str(_DEFAULT.rotation),
        metadata={
            "help": "Target angle: 'equilibrium' (from learning rate and weight decay), 'match' (the steady angle of "
            "the free-running optimizer) or a number, in radians per step at the peak learning rate."
        },
    )
    rotation_angle_weight_decay: float = field(
        default=_DEFAULT.angle_weight_decay,
        metadata={"help": "Weight decay that sets the equilibrium angle when --weight_decay is 0."},
    )
    rotation_update_norm_decay: float = field(
        default=_DEFAULT.update_norm_decay,
        metadata={"help": "Decay of the running average of each neuron's update size."},
    )
    rotation_eps: float = field(
        default=_DEFAULT.rotational_eps, metadata={"help": "Added to the update's size before dividing by it."}
    )
    rotation_centering: str = field(
        default=_DEFAULT.centering,
        metadata={"help": "Take the mean out of each neuron's 'updates', of its 'weights' too, or 'none'."},
    )
    rotation_granularity: str = field(
        default=_DEFAULT.granularity,
        metadata={"help": "Hold the norm and set the angle of each 'neuron' or of each 'tensor' as a whole."},
    )
    rotation_rounding: str = field(
        default=_DEFAULT.rounding,
        metadata={"help": "Rounding of 16-bit parameters: 'nearest', 'kahan' or 'stochastic'."},
    )
    rotation_transient_correction: bool = field(
        default=_DEFAULT.transient_correction,
        metadata={"help": "Bring the first steps, whose updates differ in size from later ones, to the target angle."},
    )
    rotation_backend: str = field(
        default=_DEFAULT.backend, metadata={"help": "How a step is computed: 'auto', 'eager' or 'foreach'."}
    )
    rotation_include: list[str] = field(
        default_factory=list,
        metadata={"help": "Regular expressions of parameter names that rotate though they would be left out."},
    )
    rotation_exclude: list[str] = field(
        default_factory=list, metadata={"help": "Regular expressions of parameter names that do not rotate."}
    )
    rotation_embeddings: bool = field(
        default=_DEFAULT.embeddings, metadata={"help": "Rotate embeddings and heads tied to them."}
    )
    rotation_multipliers: list[str] = field(
        default_factory=list,
        metadata={"help": "Factors on the target angle, PATTERN=FACTOR; the last pattern that matches a name counts."},
    )
    rotation_logging_steps: int = field(
        default=25,
        metadata={
            "help": "Measure rotation every this many optimizer steps, log it with the loss and keep it in "
            "rotation.jsonl; 0: never."
        },
    )

    def __post_init__(self) -> None:
        optim = optim_name(self)
        if optim in OPTIMIZERS:
            # The parent converts optim to its own enum, which need not know our names.
            self.optim = "adamw_torch"
        if self.rotation_logging_steps < 0:
            raise ValueError(f"Invalid rotation_logging_steps: {self.rotation_logging_steps} (must be at least 0)")
        super().__post_init__()  # type: ignore[no-untyped-call]
        if optim in OPTIMIZERS:
            self.optim = optim
            self.rotation = parse_rotation(self.rotation)  # type: ignore[assignment]
            given = factory_settings(self, optim)
            RotationalConfig(**{name: given[name] for name in RotationalConfig.names()})
