"""Training arguments with the settings of the rotational update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_rotational.optim.config import RotationalConfig, parse_settings
from hf_rotational.optim.factory import OPTIMIZERS, argument_name, factory_settings, optim_name
from hf_rotational.standardize import MODES

_DEFAULT = RotationalConfig()

NO_STANDARDIZATION = "none"
"""Value of ``weight_standardization`` that leaves the model as it is."""


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
    rotation_angle_weight_decay: float | None = field(
        default=_DEFAULT.angle_weight_decay,
        metadata={
            "help": "Weight decay that sets the equilibrium angle; by default --weight_decay or, where that is 0, what "
            "suits the optimizer: 0.1 for AdamW and Adam, 0.5 for Lion, 1e-4 for SGD."
        },
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
        metadata={
            "help": "Take the mean out of each neuron's 'updates', of its 'weights' too, keep it as a 'learned' "
            "parameter of its own, or 'none'."
        },
    )
    rotation_gains: str = field(
        default=_DEFAULT.gains,
        metadata={"help": "Norm of each neuron: 'fixed', or 'learned' by the inner update."},
    )
    rotation_gain_lr_multiplier: float = field(
        default=_DEFAULT.gain_lr_multiplier,
        metadata={"help": "Factor on the learning rate for learned gains and means."},
    )
    rotation_gain_weight_decay: float = field(
        default=_DEFAULT.gain_weight_decay, metadata={"help": "Weight decay of learned gains and means."}
    )
    rotation_granularity: str = field(
        default=_DEFAULT.granularity,
        metadata={"help": "Hold the norm and set the angle of each 'neuron' or of each 'tensor' as a whole."},
    )
    rotation_rounding: str = field(
        default=_DEFAULT.rounding,
        metadata={
            "help": "Rounding of 16-bit parameters: 'nearest', 'kahan' or 'stochastic'; 'auto' is kahan where weights "
            "of 16 bits train."
        },
    )
    rotation_transient_correction: bool = field(
        default=_DEFAULT.transient_correction,
        metadata={"help": "Bring the first steps, whose updates differ in size from later ones, to the target angle."},
    )
    rotation_backend: str = field(
        default=_DEFAULT.backend, metadata={"help": "How a step is computed: 'auto', 'fused', 'eager' or 'foreach'."}
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
    weight_standardization: str = field(
        default=NO_STANDARDIZATION,
        metadata={
            "help": "Reparametrize the model before training: 'function_preserving' trains gain, mean and direction of "
            "each neuron apart, 'drop_mean' gain and direction without the mean, 'gain' adds a gain to its weights, or "
            "'none'. For every optimizer; what is saved is plain."
        },
    )

    def __post_init__(self) -> None:
        optim = optim_name(self)
        if optim in OPTIMIZERS:
            # The parent converts optim to its own enum, which need not know our names.
            self.optim = "adamw_torch"
        super().__post_init__()  # type: ignore[no-untyped-call]
        if optim in OPTIMIZERS:
            self.optim = optim
        check_arguments(self)


def check_arguments(args: Any) -> None:
    """Checks the fields above on training arguments that have them, and reads numbers that came as text.

    Raises:
        ValueError: for a setting out of range or an unknown ``optim_args`` key.
    """
    if args.rotation_logging_steps < 0:
        raise ValueError(f"Invalid rotation_logging_steps: {args.rotation_logging_steps} (must be at least 0)")
    modes = (NO_STANDARDIZATION, *MODES)
    if args.weight_standardization not in modes:
        raise ValueError(
            f"Invalid weight_standardization: {args.weight_standardization!r} (must be one of {', '.join(modes)})"
        )
    optim = optim_name(args)
    if optim in OPTIMIZERS:
        # YAML reads 1e-8 as text, and a command line reads the angle so, which may be a number.
        for name, default in vars(_DEFAULT).items():
            if isinstance(getattr(args, argument_name(name)), str):
                text = {name: getattr(args, argument_name(name))}
                setattr(args, argument_name(name), parse_settings(text, {name: default})[name])
        given = factory_settings(args, optim)
        RotationalConfig(**{name: given[name] for name in RotationalConfig.names() if name in given})
