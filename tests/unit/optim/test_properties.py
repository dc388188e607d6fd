"""What holds for every optimizer, shape and setting: the geometry of a step and its symmetries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_rotational.optim.groups import neuron_span
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.rotation import neuron_norm
from tests.helpers import ROTATIONAL, each_name, each_optimizer, exactly_equal, make, noise, train

STEPS = 4

some_examples = settings(deadline=None, derandomize=True, max_examples=40)


@dataclass(frozen=True)
class Problem:
    """A weight, how its neurons lie in it, and how it rotates."""

    shape: tuple[int, ...]
    neuron_dims: tuple[int, ...]
    options: dict[str, Any]
    seed: int

    def weight(self, dtype: torch.dtype = torch.float64) -> nn.Parameter:
        return nn.Parameter(noise(*self.shape, seed=self.seed, dtype=dtype))

    def optimizer(
        self, build: Callable[..., RotationalOptimizer], weight: nn.Parameter, **options: Any
    ) -> RotationalOptimizer:
        groups = [{"params": [weight], "neuron_dims": self.neuron_dims}]
        optimizer: RotationalOptimizer = make(build, groups, **{**self.options, **options})
        return optimizer

    def span(self, optimizer: RotationalOptimizer) -> tuple[int, ...]:
        """The dims of one neuron."""
        ((weight, group),) = optimizer.rotating()
        return neuron_span(weight, group)

    def start(self, span: tuple[int, ...]) -> Tensor:
        """The weight as the first step finds it."""
        weight = self.weight().detach()
        return weight - weight.mean(span, keepdim=True) if self.options["centering"] == "weights" else weight


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Matrices to 4-D stacks whose neurons lie along one to three dims, down to one neuron and the least fan-in."""
    centering = draw(st.sampled_from(["none", "updates", "weights"]))
    neurons = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    least_fan_in = 3 if centering == "weights" else 2
    span = draw(st.lists(st.integers(1, 3), max_size=3 - len(neurons)))
    sizes = [*neurons, draw(st.integers(least_fan_in, 6)), *span]
    order = draw(st.permutations(range(len(sizes))))
    return Problem(
        shape=tuple(sizes[place] for place in order),
        neuron_dims=tuple(dim for dim, place in enumerate(order) if place < len(neurons)),
        options={
            "centering": centering,
            "granularity": draw(st.sampled_from(["neuron", "tensor"])),
            "update_norm_decay": draw(st.sampled_from([0.0, 0.5, 0.9])),
            "backend": draw(st.sampled_from(["eager", "foreach"])),
            "rotation": draw(st.sampled_from(["equilibrium", "match", 0.3])),
        },
        seed=draw(st.integers(0, 99)),
    )


@each_optimizer
@some_examples
@given(problem=problems())
def test_norms_are_kept(build: Callable[..., RotationalOptimizer], problem: Problem) -> None:
    weight = problem.weight()
    optimizer = problem.optimizer(build, weight)
    span = problem.span(optimizer)
    train(optimizer, [weight], range(STEPS))
    expected = neuron_norm(problem.start(span), span)
    torch.testing.assert_close(neuron_norm(weight.detach(), span), expected, rtol=1e-14, atol=0.0)


@each_optimizer
@some_examples
@given(problem=problems())
def test_steps_are_tangent_and_of_the_stated_size(build: Callable[..., RotationalOptimizer], problem: Problem) -> None:
    weight = problem.weight()
    optimizer = problem.optimizer(build, weight)
    span, decay = problem.span(optimizer), problem.options["update_norm_decay"]
    before, mean_sq_before = problem.start(span), torch.zeros(())
    for step in range(1, STEPS + 1):
        train(optimizer, [weight], [step])
        mean_sq = optimizer.state[weight]["update_norm_sq"].clone()
        # The running average gives away the size of the newest update, |u|^2. It begins with the first that is not 0.
        begins = mean_sq_before == 0
        size_sq = torch.where(begins, mean_sq / (1 - decay**step), (mean_sq - decay * mean_sq_before) / (1 - decay))
        target = optimizer.target_rotation(optimizer.param_groups[0])
        ratio = target * size_sq.clamp(min=0).sqrt() / ((mean_sq / (1 - decay**step)).sqrt() + 1e-8)
        # p' is parallel to p - u' with u' tangent and |u'| = ratio |p|: the triangle's third side has this cosine.
        cosine = (before * weight.detach()).sum(span, keepdim=True) / neuron_norm(before, span) ** 2
        torch.testing.assert_close(cosine, 1 / (1 + ratio.square()).sqrt(), rtol=1e-12, atol=1e-12)
        before, mean_sq_before = weight.detach().clone(), mean_sq


def only_directions_matter(name: str) -> dict[str, Any]:
    """Settings free of every size that a gradient or a weight could be compared with."""
    adam_eps = {"eps": 1e-30} if "Adam" in name else {}
    # SGD's updates are as large as the gradients; the others' have size 1, whatever the gradients. Their eps may keep
    # down what rounding leaves of an update without a centred part: Adam's first are signs, and may all be equal.
    rotational_eps = 1e-6 if "Adam" in name or name == "Lion" else 1e-30
    # Adam would add weight decay to the gradient.
    return {"rotation": 0.3, "weight_decay": 0.0, "rotational_eps": rotational_eps, **adam_eps}


# Rounding, and what the wrapper loses where it finds an update as the difference of two weights.
rounded_alike = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-8)


@each_name
@some_examples
@given(problem=problems(), factor=st.floats(1e-3, 1e3))
def test_the_scale_of_the_gradients_does_not_matter(name: str, problem: Problem, factor: float) -> None:
    results = []
    for scale in (1.0, factor):
        weight = problem.weight()
        optimizer = problem.optimizer(ROTATIONAL[name], weight, **only_directions_matter(name))
        train(optimizer, [weight], range(STEPS), factor=scale)
        results.append(weight)
    rounded_alike(*results)


@each_name
@some_examples
@given(problem=problems(), factors_seed=st.integers(0, 99))
def test_the_scale_of_a_neuron_does_not_matter_to_its_direction(name: str, problem: Problem, factors_seed: int) -> None:
    """The gradient of a function of the direction alone is the smaller the larger the neuron."""
    weight, scaled = problem.weight(), problem.weight()
    settings = only_directions_matter(name)
    optimizer, other = (problem.optimizer(ROTATIONAL[name], each, **settings) for each in (weight, scaled))
    per_neuron = neuron_norm(weight.detach(), problem.span(optimizer)).shape
    factor = noise(*per_neuron, seed=factors_seed).exp()
    scaled.data *= factor
    train(optimizer, [weight], range(STEPS))
    train(other, [scaled], range(STEPS), factor=1 / factor)
    rounded_alike(scaled / factor, weight)


@each_optimizer
@some_examples
@given(
    order=st.permutations(range(8)),
    groups_swapped=st.booleans(),
    backend=st.sampled_from(["eager", "foreach"]),
    rotation=st.sampled_from(["equilibrium", "match"]),
)
def test_order_does_not_matter(
    build: Callable[..., RotationalOptimizer], order: list[int], groups_swapped: bool, backend: str, rotation: str
) -> None:
    shapes = [(5, 7), (5, 7), (5,), (5,), (5, 7), (2, 3, 4), (5, 7), (2, 3, 4)]

    def trained(places: Iterable[int], swapped: bool) -> list[nn.Parameter]:
        params = [nn.Parameter(noise(*shape, seed=place)) for place, shape in enumerate(shapes)]
        groups: list[dict[str, Any]] = [{"params": [], "centering": centering} for centering in ("none", "updates")]
        for place in places:
            groups[place % 2]["params"].append(params[place])
        optimizer = make(build, groups[::-1] if swapped else groups, backend=backend, rotation=rotation)
        train(optimizer, params, range(STEPS))
        return params

    exactly_equal(trained(order, groups_swapped), trained(range(8), False))


MOMENTUM_OFF: dict[str, dict[str, Any]] = {
    "AdamW": {"betas": (0.0, 0.999)},
    "Adam": {"betas": (0.0, 0.999)},
    "SGD": {},
    "Lion": {"betas": (0.0, 0.99)},
    "NAdam": {"betas": (0.0, 0.999)},
}


@each_name
@some_examples
@given(
    problem=problems(),
    steps=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_without_gradient_and_momentum_nothing_moves(
    name: str, problem: Problem, steps: int, dtype: torch.dtype
) -> None:
    weight = problem.weight(dtype)
    optimizer = problem.optimizer(ROTATIONAL[name], weight, **MOMENTUM_OFF.get(name, {}))
    # Where momentum cannot be turned off it is not there before the first gradient.
    train(optimizer, [weight], range(steps if name in MOMENTUM_OFF else 0))
    weight.grad = torch.zeros_like(weight)
    if problem.options["centering"] == "weights":
        optimizer.step()  # centres what has not been centred yet
    before = weight.detach().clone()
    optimizer.step()
    exactly_equal(weight.detach(), before)
