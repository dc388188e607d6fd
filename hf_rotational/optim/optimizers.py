"""The optimizers: an inner update and its hyperparameters, bound to the one rotational step."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hf_rotational.optim import inner as inners
from hf_rotational.optim.groups import RotationalOptions
from hf_rotational.optim.optimizer import RotationalOptimizer


class OptimizerOptions(RotationalOptions, total=False):
    """Keyword arguments that are not per group, besides those that are."""

    backend: str
    capturable: bool
    maximize: bool


class RotationalAdamW(RotationalOptimizer):
    """AdamW whose neurons turn by its equilibrium angle from the first step on, at constant norm.

    What rotates, and the keyword arguments that set the angle: :class:`RotationalOptimizer`. Parameters that do not
    rotate take exactly AdamW's update.

    Example::

        groups = plan(model).parameter_groups()
        optimizer = RotationalAdamW(groups, lr=5e-5, weight_decay=0.1)

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square, in [0, 1).
        eps: added to the root of the mean squared gradient.
        weight_decay: for rotating tensors it sets the angle, ``sqrt(2 lr wd (1-b1)/(1+b1))`` radians per step
            (paper, table 1); for the others it is AdamW's decoupled weight decay.
        **options: see :class:`RotationalOptimizer`.
    """

    inner: ClassVar[inners.Inner] = inners.AdamW()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, **options)


class RotationalAdam(RotationalAdamW):
    """Adam with L2 regularization whose neurons all turn by AdamW's angle: the balance that Adam itself lacks.

    For rotating tensors the second moment sees the gradient plus ``weight_decay`` times the weight, the first moment
    the gradient alone, as in the published wrapper; the others take exactly ``torch.optim.Adam``'s update. Arguments
    as :class:`RotationalAdamW`.
    """

    inner: ClassVar[inners.Inner] = inners.Adam()


class RotationalSGD(RotationalOptimizer):
    """SGD with momentum whose neurons turn by its equilibrium angle from the first step on, at constant norm.

    Parameters that do not rotate take exactly ``torch.optim.SGD``'s update.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: decay of the sum of gradients, in [0, 1).
        dampening: share of each new gradient left out of that sum, in [0, 1).
        weight_decay: for rotating tensors it sets the angle, ``sqrt(2 lr wd/(1+momentum))`` radians per step
            (paper, table 1), whatever ``nesterov`` and ``dampening``; for the others it is L2 regularization.
        nesterov: look ahead by one step of momentum.
        **options: see :class:`RotationalOptimizer`.
    """

    inner: ClassVar[inners.Inner] = inners.SGD()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov}, **options)


class RotationalLion(RotationalOptimizer):
    """Lion whose neurons turn by its equilibrium angle from the first step on, at constant norm.

    Parameters that do not rotate take exactly Lion's update.

    Args:
        params: parameters or groups of them.
        lr: learning rate, typically 3 to 10 times below AdamW's.
        betas: the share of momentum in the sign, and momentum's decay, in [0, 1).
        weight_decay: for rotating tensors it sets the angle, ``sqrt(pi lr wd ((1-b1)^2 + b1^2 (1-b2)/(1+b2)))``
            radians per step (paper, table 1; linearised, for ``lr wd << 1-b2``); for the others it is decoupled
            weight decay.
        **options: see :class:`RotationalOptimizer`.
    """

    inner: ClassVar[inners.Inner] = inners.Lion()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-1,
        **options: Unpack[OptimizerOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)
