"""What each way of rounding does to a walk whose steps are small against a 16-bit weight (docs/precision.md).

    python -m benchmarks.rounding

prints a table and writes benchmarks/results/rounding.json; half a minute on one core.

All rows of one angle walk from the same weights with the same random gradients. The rows called "published" are the
published algorithm (paper, algorithm 1) as its code runs on such parameters: state and arithmetic in their dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.random_walk import independent, walk
from hf_rotational import RotationalAdamW
from hf_rotational.monitor.measure import neuron_angles
from hf_rotational.optim.rotation import neuron_norm

RESULTS = Path(__file__).parent / "results" / "rounding.json"
# Weights as large as a transformer's at the start; how far 16 bits resolve does not depend on it (float16: nearly).
NEURONS, FAN_IN, WEIGHT_STD, STEPS = 256, 768, 0.02, 200
ANGLES = (1e-4, 1e-3)

Make = Callable[[list[Tensor], float], Optimizer]
"""From parameters and radians per step to an optimizer."""


class PublishedAdamW(Optimizer):
    """The published rotational AdamW for matrices whose rows are neurons, in the parameter's own dtype throughout."""

    def __init__(self, params: list[Tensor], angle: float) -> None:
        super().__init__(params, {"angle": angle, "betas": (0.9, 0.999), "eps": 1e-8, "update_norm_decay": 0.9})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the published one takes none
        for group in self.param_groups:
            (beta1, beta2), eps, beta = group["betas"], group["eps"], group["update_norm_decay"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s.update(t=0, n=neuron_norm(p, (1,)), m=torch.zeros_like(p), v=torch.zeros_like(p), nu=0.0)
                s["t"] += 1
                t, n = s["t"], s["n"]
                s["m"].lerp_(p.grad, 1 - beta1)
                s["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                u = (s["m"] / (1 - beta1**t)) / ((s["v"] / (1 - beta2**t)).sqrt() + eps)
                u -= p * (u * p).sum(1, keepdim=True) / n**2
                s["nu"] = beta * s["nu"] + (1 - beta) * u.square().sum(1, keepdim=True)
                turned = p - group["angle"] * n * (u / ((s["nu"] / (1 - beta**t)).sqrt() + eps))
                # From left to right, as published: each entry is rounded twice.
                p.copy_(turned * n / neuron_norm(turned, (1,)))


def rounded(rounding: str) -> Make:
    """This package's optimizer with a rounding."""
    return lambda params, angle: RotationalAdamW(params, rotation=angle, weight_decay=0.0, rounding=rounding)


OPTIMIZERS: dict[str, Make] = {"published": PublishedAdamW} | {
    rounding: rounded(rounding) for rounding in ("nearest", "kahan", "stochastic")
}


@dataclass(frozen=True)
class Outcome:
    """What became of a walk; ``None`` where weights became NaN."""

    moved: float | None
    """Share of the entries that are not what they were."""
    norm_drift: float | None
    """Mean of ``|norm/start - 1|`` over the neurons."""
    angle_per_step: float | None
    """Mean angle between the weights before and after a step, relative to the wanted one."""
    angle_in_all: float | None
    """Mean angle between the first and the last weights, relative to float32's."""
    off_course: float | None
    """Mean angle between these last weights and float32's, relative to the angle that those have turned."""
    bytes_per_entry: float
    """Memory of parameter and optimizer state."""


@dataclass(frozen=True)
class Walk:
    start: Tensor
    end: Tensor
    mean_angle: float
    bytes_per_entry: float


def take(dtype: torch.dtype, make: Make, angle: float) -> Walk:
    """One walk. Where it starts and ends is in float32."""
    draw = torch.randn(NEURONS, FAN_IN, generator=torch.Generator().manual_seed(1))
    # Values that every dtype holds, so that all walks start at one place.
    start = (WEIGHT_STD * draw).bfloat16().to(torch.float16).float()
    weight = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = make([weight], angle)
    angles = [step.mean() for step in walk(optimizer, weight, independent(), STEPS)]
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return Walk(
        start=start,
        end=weight.detach().float(),
        mean_angle=float(torch.stack(angles).mean()),
        bytes_per_entry=sum(tensor.nbytes for tensor in (weight, *state)) / weight.numel(),
    )


def judge(taken: Walk, exact: Walk, angle: float) -> Outcome:
    """A walk against the one in float32."""
    if not taken.end.isfinite().all():
        return Outcome(None, None, None, None, None, taken.bytes_per_entry)
    way = neuron_angles(exact.start, exact.end, (1,)).mean()
    norms = neuron_norm(taken.start, (1,)), neuron_norm(taken.end, (1,))
    return Outcome(
        moved=float((taken.end != taken.start).float().mean()),
        norm_drift=float((norms[1] / norms[0] - 1).abs().mean()),
        angle_per_step=taken.mean_angle / angle,
        angle_in_all=float(neuron_angles(taken.start, taken.end, (1,)).mean() / way),
        off_course=float(neuron_angles(exact.end, taken.end, (1,)).mean() / way),
        bytes_per_entry=taken.bytes_per_entry,
    )


def outcomes(angle: float) -> Iterator[tuple[str, str, Outcome]]:
    """Parameter dtype, rounding and outcome, for all that are compared."""
    exact = take(torch.float32, OPTIMIZERS["nearest"], angle)
    yield "float32", "none", judge(exact, exact, angle)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        # The best there is: computed in float32, stored in 16 bits once.
        yield name, "at the end", judge(replace(exact, end=exact.end.to(dtype).float()), exact, angle)
        for rounding, make in OPTIMIZERS.items():
            yield name, rounding, judge(take(dtype, make, angle), exact, angle)


COLUMNS = {
    "moved": ("entries moved", "{:.0%}"),
    "norm_drift": ("norm drift", "{:.3%}"),
    "angle_per_step": ("angle per step / wanted", "{:.2f}"),
    "angle_in_all": ("angle in all / float32's", "{:.2f}"),
    "off_course": ("off course", "{:.2f}"),
    "bytes_per_entry": ("bytes per entry", "{:.1f}"),
}


def main() -> None:
    table = Table(title=f"{STEPS} steps, {NEURONS} neurons of {FAN_IN} entries")
    for title in ("rad per step", "parameter", "rounding", *(title for title, _ in COLUMNS.values())):
        table.add_column(title)
    rows = []
    for angle in ANGLES:
        for parameter, rounding, outcome in outcomes(angle):
            row = asdict(outcome)
            rows.append({"angle": angle, "parameter": parameter, "rounding": rounding, **row})
            numbers = ("NaN" if row[key] is None else form.format(row[key]) for key, (_, form) in COLUMNS.items())
            table.add_row(f"{angle:g}", parameter, rounding, *numbers)
        table.add_section()
    Console(width=120).print(table)
    walked = {"neurons": NEURONS, "fan_in": FAN_IN, "weight_std": WEIGHT_STD, "steps": STEPS}
    text = json.dumps({"torch": torch.__version__, "walk": walked, "rows": rows}, indent=2)
    RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
