"""How far early steps are from the target angle, with and without ``transient_correction`` (docs/transient.md).

    python -m benchmarks.transient

prints a table and writes benchmarks/results/transient.json; 15 seconds on one core.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.random_walk import constant, independent, walk
from hf_rotational import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD
from hf_rotational.optim import RotationalOptimizer

RESULTS = Path(__file__).parent / "results" / "transient.json"
# Enough rows that their mean is within 1 % of the expectation at every step; weights as large as a transformer's.
NEURONS, FAN_IN, WEIGHT_STD, STEPS = 256, 256, 0.02, 500
SHOWN = (1, 2, 3, 5, 10, 20, 30, 50, 100)

# How large the angle is does not matter here; betas and momentum do.
OPTIMIZERS: dict[str, Callable[..., RotationalOptimizer]] = {
    "AdamW": partial(RotationalAdamW, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999)),
    "SGD": partial(RotationalSGD, lr=0.1, weight_decay=1e-4, momentum=0.9),
    "Lion": partial(RotationalLion, lr=1e-4, weight_decay=1.0, betas=(0.9, 0.99)),
    "Adam": partial(RotationalAdam, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999)),
}
GRADIENTS = {"independent": independent, "constant": constant}


def relative_angles(
    optimizer: str,
    *,
    gradients: str = "independent",
    correction: bool = False,
    neurons: int = NEURONS,
    steps: int = STEPS,
) -> Tensor:
    """Mean angle over the neurons, relative to the target angle, at each of the first steps."""
    draw = torch.randn(neurons, FAN_IN, generator=torch.Generator().manual_seed(1))
    weight = torch.nn.Parameter(WEIGHT_STD * draw)
    rotational = OPTIMIZERS[optimizer]([weight], transient_correction=correction)
    (group,) = rotational.param_groups
    angles = [angle.mean() for angle in walk(rotational, weight, GRADIENTS[gradients](), steps)]
    return torch.stack(angles) / rotational.target_rotation(group)


def main() -> None:
    table = Table(title=f"Mean angle over {NEURONS} neurons of {FAN_IN} entries, relative to the target, at step")
    for title in ("gradients", "optimizer", "correction", *map(str, SHOWN), f"1-{STEPS}"):
        table.add_column(title)
    rows = []
    for gradients, optimizer, correction in product(GRADIENTS, OPTIMIZERS, (False, True)):
        angles = relative_angles(optimizer, gradients=gradients, correction=correction)
        at_step, mean = {step: float(angles[step - 1]) for step in SHOWN}, float(angles.mean())
        table.add_row(
            gradients,
            optimizer,
            "on" if correction else "off",
            *(f"{angle:.2f}" for angle in (*at_step.values(), mean)),
        )
        rows.append(
            {
                "gradients": gradients,
                "optimizer": optimizer,
                "transient_correction": correction,
                "at_step": at_step,
                "mean": mean,
            }
        )
    Console(width=120).print(table)
    walked = {"neurons": NEURONS, "fan_in": FAN_IN, "weight_std": WEIGHT_STD, "steps": STEPS}
    text = json.dumps({"torch": torch.__version__, "walk": walked, "rows": rows}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
