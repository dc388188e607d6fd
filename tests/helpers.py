"""Every rotational optimizer under one roof, and what tests of several modules do with one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_rotational import RotationalAdam, RotationalAdamW, RotationalLion, RotationalSGD, rotational
from hf_rotational.optim.optimizer import RotationalOptimizer

Builder = Callable[..., torch.optim.Optimizer]

LR, WEIGHT_DECAY = 1e-2, 0.1
# Float64 leaves ~1e-16 a step and 100 steps; float32 ~6e-8 a step, on weights of size 1.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}

ROTATIONAL: Mapping[str, Callable[..., RotationalOptimizer]] = {
    "AdamW": RotationalAdamW,
    "Adam": RotationalAdam,
    "SGD": RotationalSGD,
    "momentum": partial(RotationalSGD, momentum=0.9),
    "nesterov": partial(RotationalSGD, momentum=0.9, nesterov=True),
    "Lion": RotationalLion,
    "NAdam": rotational(torch.optim.NAdam),
}
WRITTEN_OUT = {name: build for name, build in ROTATIONAL.items() if name != "NAdam"}
"""Those that do not wrap an optimizer of torch's."""
PLAIN: Mapping[str, Builder] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "NAdam": torch.optim.NAdam,
}
"""The torch optimizer behind each; torch has no Lion."""

each_name = pytest.mark.parametrize("name", ROTATIONAL)
each_optimizer = pytest.mark.parametrize("build", ROTATIONAL.values(), ids=ROTATIONAL)
each_backend = pytest.mark.parametrize("backend", ["fused", "eager", "foreach"])

exactly_equal = partial(torch.testing.assert_close, rtol=0.0, atol=0.0, equal_nan=True)
"""Asserts that numbers, tensors, or collections of them are the same, bit for bit."""


def make(build: Builder, params: Any, **options: Any) -> Any:
    """An optimizer at the tests' learning rate and weight decay, or others."""
    return build(params, **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same ones for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """A matrix and a stack of matrices that rotate, and a vector that does not."""
    return [
        nn.Parameter(noise(*shape, seed=place, dtype=dtype)) for place, shape in enumerate([(5, 7), (2, 3, 4), (5,)])
    ]


def gradient(parameter: Tensor, place: int, step: int) -> Tensor:
    """What :func:`train` gives the parameter at this place at this step."""
    return noise(*parameter.shape, seed=1000 * (step + 1) + place, dtype=parameter.dtype)


def train(
    optimizer: torch.optim.Optimizer,
    params: Sequence[nn.Parameter | None],
    steps: Iterable[int],
    factor: float | Tensor = 1.0,
) -> None:
    """Takes steps with gradients that depend on the parameter's place in ``params`` and the step's number alone."""
    for step in steps:
        for place, parameter in enumerate(params):
            if parameter is not None:
                parameter.grad = factor * gradient(parameter, place, step)
        optimizer.step()


def copies(params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters' values now."""
    return [parameter.detach().clone() for parameter in params]


def turned(before: Tensor, after: Tensor) -> Tensor:
    """Angle between rows, in radians. The arc cosine would lose small angles to rounding."""
    before, after = (nn.functional.normalize(rows.detach().flatten(1)) for rows in (before, after))
    return 2 * torch.asin((before - after).norm(dim=1) / 2)


def gradients(shape: tuple[int, ...], steps: int = 100, seed: int = 1) -> list[Tensor]:
    """Fresh gradients with a mean, of sizes that differ from row to row by orders of magnitude, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.arange(-3, shape[0] - 3, dtype=torch.float64).clamp(max=2).view(-1, *[1] * (len(shape) - 1))
    return [scale * (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3) for _ in range(steps)]


def train_on(optimizer: torch.optim.Optimizer, grads: dict[nn.Parameter, list[Tensor]], lrs: list[float]) -> None:
    """Takes a step for each learning rate, with each parameter's next gradient."""
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        for parameter, series in grads.items():
            # A copy: an optimizer that wrote into a gradient would spoil the reference's.
            parameter.grad = series[step].to(parameter.dtype, copy=True)
        optimizer.step()


class PlainLion(torch.optim.Optimizer):
    """Lion as published (arXiv 2302.06675, algorithm 2), which torch does not have."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = group["betas"][0] * m + (1 - group["betas"][0]) * p.grad
                p -= group["lr"] * (c.sign() + group["weight_decay"] * p)
                m.mul_(group["betas"][1]).add_((1 - group["betas"][1]) * p.grad)
