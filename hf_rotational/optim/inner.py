"""Inner updates: what an optimizer does with gradients before anybody thinks of spheres.

An inner keeps its moments in each parameter's state and gives *directions*: its updates without learning rate and,
for tensors that rotate, without weight decay. Everything works on lists of tensors of one dtype and device, so that the
same lines run tensor by tensor or as multi-tensor calls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_rotational import equilibrium

Group = dict[str, Any]
State = dict[str, Any]
Tensors = list[Tensor]


class Inner(ABC):
    """One optimizer's directions and closed forms. Stateless: everything is in the states and the group."""

    decoupled: ClassVar[bool]
    """Whether weight decay shrinks the weights beside the update, or enters the gradient (L2)."""
    counts_steps: ClassVar[bool] = True
    """Whether ``state["step"]`` is this inner's."""

    @abstractmethod
    def buffers(self, group: Group) -> tuple[str, ...]:
        """Names of the state tensors shaped like the parameter; they start at zero."""

    @abstractmethod
    def check(self, group: Group) -> None:
        """Raises ``ValueError`` for a hyperparameter of the group that makes no sense, naming it and its value."""

    @abstractmethod
    def directions_into(
        self, updates: Tensors, grads: Tensors, weights: Tensors, states: list[State], group: Group, *, rotates: bool
    ) -> None:
        """Updates the moments and writes directions: what to subtract, per unit of learning rate.

        Args:
            updates: where to write them.
            grads: gradients, in the dtype of the states.
            weights: the weights, for L2 regularization.
            states: one dict a tensor, all of one age; ``state["step"]`` has counted this step.
            group: the hyperparameters.
            rotates: leave L2 out of the direction: on the sphere weight decay only sets the angle.
        """

    def descend_(self, weights: list[Tensor], updates: list[Tensor], group: Group) -> None:
        """Takes the plain step along directions, in place. With ``lr == 0`` weights stay bit for bit."""
        lr = float(group["lr"])
        if lr == 0:
            return
        if self.decoupled and group["weight_decay"] != 0:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr)

    @abstractmethod
    def rotation(self, group: Group, lr: float) -> float:
        """Equilibrium angle at this learning rate, in radians per step (paper, table 1)."""

    @abstractmethod
    def momentum(self, group: Group) -> float:
        """Decay of the average of gradients, per step."""

    @abstractmethod
    def relative_size_sq(self, group: Group, step: int) -> float:
        """Expected squared size of update number ``step``, relative to a late one, for independent gradients."""


class AdamW(Inner):
    """Adam's direction: the mean gradient over the root of the mean squared gradient, both bias corrected."""

    decoupled = True

    def buffers(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def check(self, group: Group) -> None:
        check_betas(group["betas"])
        check_non_negative("eps", group["eps"])
        if group.get("amsgrad"):
            raise ValueError(
                "Invalid amsgrad: True (a running maximum of squared gradients is kept only by "
                "rotational(torch.optim.AdamW) and rotational(torch.optim.Adam))"
            )

    def directions_into(
        self, updates: Tensors, grads: Tensors, weights: Tensors, states: list[State], group: Group, *, rotates: bool
    ) -> None:
        self._adam_(updates, grads, grads, states, group)

    def _adam_(self, updates: Tensors, grads: Tensors, squared: Tensors, states: list[State], group: Group) -> None:
        (beta1, beta2), eps, step = group["betas"], group["eps"], step_of(states)
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        if squared is grads and fit_kernel([*updates, *grads, *means, *squares]):
            # What torch's AdamW makes of zeros at learning rate -1: the same in one pass over memory.
            torch._foreach_zero_(updates)
            count = torch.tensor(step, dtype=torch.float32)
            numbers = {"lr": -1.0, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": 0.0}
            counts = [count] * len(means)
            torch._fused_adamw_(updates, grads, means, squares, [], counts, **numbers, amsgrad=False, maximize=False)
            return
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, squared, squared, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        # Both corrections of biases in the denominator: (1 - b1^t) (sqrt(v/(1 - b2^t)) + eps).
        corrected = 1 - beta1**step
        torch._foreach_mul_(roots, corrected / math.sqrt(1 - beta2**step))
        torch._foreach_add_(roots, corrected * eps)
        torch._foreach_copy_(updates, torch._foreach_div(means, roots))

    def rotation(self, group: Group, lr: float) -> float:
        return known(equilibrium.adamw(lr=lr, weight_decay=group["weight_decay"], betas=group["betas"]).rotation)

    def momentum(self, group: Group) -> float:
        return float(group["betas"][0])

    def relative_size_sq(self, group: Group, step: int) -> float:
        # Variance of the bias-corrected mean of `step` gradients; the second moment is taken as settled.
        decayed: float = group["betas"][0] ** step
        return (1 + decayed) / (1 - decayed)


class Adam(AdamW):
    """Adam with L2 regularization, as the published wrapper has it.

    Where a tensor rotates, the second moment sees gradient plus L2 term and the first moment the gradient alone. The
    angle is AdamW's: imposing one angle is what gives Adam the balance that it lacks (paper, section 3.3).
    """

    decoupled = False

    def directions_into(
        self, updates: Tensors, grads: Tensors, weights: Tensors, states: list[State], group: Group, *, rotates: bool
    ) -> None:
        regularized = with_l2(grads, weights, group)
        self._adam_(updates, grads if rotates else regularized, regularized, states, group)


class SGD(Inner):
    """SGD's direction: a sum of decayed gradients (momentum), as ``torch.optim.SGD`` defines it.

    The equilibrium angle is heavy-ball momentum's, ``sqrt(2 lr wd/(1+momentum))``, whatever Nesterov and dampening are:
    those change where an update points.
    """

    decoupled = False

    def buffers(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def check(self, group: Group) -> None:
        if not 0.0 <= group["momentum"] < 1.0:
            raise ValueError(f"Invalid momentum: {group['momentum']} (must be in [0, 1))")
        if not 0.0 <= group["dampening"] < 1.0:
            raise ValueError(f"Invalid dampening: {group['dampening']} (must be in [0, 1))")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"Invalid nesterov: {group['nesterov']} with momentum={group['momentum']}, "
                f"dampening={group['dampening']} (Nesterov needs momentum > 0 and dampening 0)"
            )

    def directions_into(
        self, updates: Tensors, grads: Tensors, weights: Tensors, states: list[State], group: Group, *, rotates: bool
    ) -> None:
        if not rotates:
            grads = with_l2(grads, weights, group)
        if not group["momentum"]:
            torch._foreach_copy_(updates, grads)
            return
        buffers = [state["momentum_buffer"] for state in states]
        # The first gradient enters undamped, as in torch.
        new = 1.0 if step_of(states) == 1 else 1.0 - group["dampening"]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=new)
        torch._foreach_copy_(updates, buffers)
        if group["nesterov"]:
            torch._foreach_mul_(updates, group["momentum"])
            torch._foreach_add_(updates, grads)

    def rotation(self, group: Group, lr: float) -> float:
        record = equilibrium.sgdm(lr=lr, weight_decay=group["weight_decay"], momentum=group["momentum"])
        return known(record.rotation)

    def momentum(self, group: Group) -> float:
        return float(group["momentum"])

    def relative_size_sq(self, group: Group, step: int) -> float:
        momentum, new = group["momentum"], 1 - group["dampening"]
        settled = new**2 / (1 - momentum**2)

        def buffer_sq(step: int) -> float:
            return float(settled + (1 - settled) * momentum ** (2 * (step - 1)))

        if not group["nesterov"]:
            return float(buffer_sq(step) / settled)
        before = buffer_sq(step - 1) if step > 1 else 0.0
        return float(((1 + momentum) ** 2 + momentum**4 * before) / ((1 + momentum) ** 2 + momentum**4 * settled))


class Lion(Inner):
    """Lion's direction: the sign of an interpolation between momentum and gradient."""

    decoupled = True

    def buffers(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg",)

    def check(self, group: Group) -> None:
        check_betas(group["betas"])

    def directions_into(
        self, updates: Tensors, grads: Tensors, weights: Tensors, states: list[State], group: Group, *, rotates: bool
    ) -> None:
        beta1, beta2 = group["betas"]
        means = [state["exp_avg"] for state in states]
        torch._foreach_copy_(updates, means)
        torch._foreach_lerp_(updates, grads, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(means, grads, 1 - beta2)

    def rotation(self, group: Group, lr: float) -> float:
        return known(equilibrium.lion(lr=lr, weight_decay=group["weight_decay"], betas=group["betas"]).rotation)

    def momentum(self, group: Group) -> float:
        return float(group["betas"][0])

    def relative_size_sq(self, group: Group, step: int) -> float:
        return 1.0  # a sign has the same size at every step


def counter(start: float = 0.0) -> Tensor:
    """A counter of steps: a tensor, as in torch, on the host, and float32 whatever torch's defaults are."""
    return torch.tensor(start, dtype=torch.float32, device="cpu")


def count_steps(states: list[State]) -> None:
    """Counts one more step in every state."""
    torch._foreach_add_([state["step"] for state in states], 1)


def step_of(states: list[State]) -> int:
    """The number of this step, which all states have counted."""
    return int(states[0]["step"].item())


def fit_kernel(tensors: list[Tensor]) -> bool:
    """Whether torch's fused kernels on CPUs can take tensors: each in one piece, in the order of its dims."""
    on_cpu = tensors[0].device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and all(tensor.is_contiguous() for tensor in tensors)


def with_l2(grads: list[Tensor], weights: list[Tensor], group: Group) -> list[Tensor]:
    """Gradients of the loss plus ``weight_decay/2 |w|^2``."""
    if group["weight_decay"] == 0:
        return grads
    return list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))


def known(value: float | None) -> float:
    """A closed form's value where its arguments determine it."""
    assert value is not None
    return value


def check_non_negative(name: str, value: float) -> None:
    """Raises ``ValueError`` unless ``value`` is a number >= 0 (NaN and infinity are not)."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"Invalid {name}: {value} (must be a finite number >= 0)")


def check_betas(betas: tuple[float, float]) -> None:
    """Raises ``ValueError`` unless ``betas`` are two numbers in [0, 1)."""
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas} (two numbers are needed)")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid betas[{index}]: {beta} (must be in [0, 1))")
