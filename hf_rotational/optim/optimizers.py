"""The optimizers: an inner update and its hyperparameters, bound to the one rotational step."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hf_rotational.optim import inner as inners
from hf_rotational.optim.optimizer import RotationalOptimizer, RotationalOptions


class RotationalAdamW(RotationalOptimizer):
    """AdamW whose neurons turn by its equilibrium angle from the first step on, at constant norm.

    Arguments with AdamW's meaning: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``maximize``. What rotates, and the
    keyword arguments that set the angle: :class:`~hf_rotational.optim.optimizer.RotationalOptimizer`. Parameters that
    do not rotate take exactly AdamW's update.

    Example::

        groups = plan(model).parameter_groups()
        optimizer = RotationalAdamW(groups, lr=5e-5, weight_decay=0.05)

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square, in [0, 1).
        eps: added to the root of the mean squared gradient.
        weight_decay: for rotating tensors it sets the angle, ``sqrt(2 lr wd (1-b1)/(1+b1))`` radians per step
            (paper, table 1); for the others it is AdamW's decoupled weight decay.
        maximize: step uphill.
    """

    inner: ClassVar[inners.Inner] = inners.AdamW()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        **rotational: Unpack[RotationalOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, maximize=maximize, **rotational)
