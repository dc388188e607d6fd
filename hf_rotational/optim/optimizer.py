"""The one optimizer step: inner direction, then rotation for what rotates, the plain update for the rest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypedDict, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_rotational.optim.inner import Group, Inner, check_non_negative
from hf_rotational.optim.rotation import center_, neuron_norm, reduced_dims, rotate_

ROTATIONS = ("equilibrium", "match")
CENTERINGS = ("none", "updates", "weights")
GRANULARITIES = ("neuron", "tensor")


class RotationalOptions(TypedDict, total=False):
    """Keyword arguments every rotational optimizer takes; each may also be set per parameter group."""

    rotation: str | float
    update_norm_decay: float
    rotational_eps: float
    centering: str
    granularity: str


class RotationalOptimizer(torch.optim.Optimizer):
    """Base of the rotational optimizers: holds norms, imposes the angle, and leaves the direction to ``inner``.

    Tensors with two or more dims rotate unless their group says ``rotational=False``; a group's ``neuron_dims``
    (default ``(0,)``) are the dims that index neurons. Vectors, and tensors whose neurons are too small to have a
    direction (one entry; two with ``centering="weights"``), take the plain inner update with the group's weight
    decay. For rotating tensors weight decay only sets the angle.

    State, made at a tensor's first step, in float32 (float64 for float64 parameters): the inner's moments; ``norm``,
    the norm each neuron is held at; ``update_norm_sq``, the running average of its update's squared size.

    A NaN or infinite gradient entry makes its own neuron NaN (with ``granularity="tensor"``: its tensor), as it would
    make its entry with the plain optimizer. Other neurons are not touched. A step with ``lr == 0`` updates the state
    and leaves the weights bit for bit.

    Args:
        params: parameters, or groups of them, as for any ``torch.optim`` optimizer.
        defaults: the inner's hyperparameters, with ``lr`` and ``weight_decay``.
        rotation: target angle. ``"equilibrium"``: the paper's, from learning rate and weight decay, so it follows a
            schedule as its root. ``"match"``: the steady angle of the free-running optimizer at this learning rate, one
            for the whole model: ``c lr / median(rms(weight))`` over the rotating tensors before their first step.
            A number: radians per step at the constructor's learning rate, scaled in proportion with a schedule.
        update_norm_decay: decay of the running average of the update's size, in [0, 1) (paper, algorithm 1).
        rotational_eps: added to the update's size before dividing by it.
        centering: ``"updates"`` takes the mean out of each neuron's updates; ``"weights"`` also out of the weights,
            once, before they first move (a pretrained model then computes something else); ``"none"`` neither.
        granularity: hold the norm and set the angle of each ``"neuron"``, or of each ``"tensor"`` as a whole.

    Raises:
        ValueError: for an argument out of range, or a rotating group whose target angle would be 0.
    """

    inner: ClassVar[Inner]
    """Where directions come from."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        rotation: str | float = "equilibrium",
        update_norm_decay: float = 0.9,
        rotational_eps: float = 1e-8,
        centering: str = "none",
        granularity: str = "neuron",
        maximize: bool = False,
    ) -> None:
        rotational = {
            "rotation": rotation,
            "update_norm_decay": update_norm_decay,
            "rotational_eps": rotational_eps,
            "centering": centering,
            "granularity": granularity,
            "rotational": True,
            "neuron_dims": (0,),
            # rms(weight) that rotation="match" divides by: measured once, then part of every checkpoint.
            "match_rms": None,
        }
        super().__init__(params, {**defaults, **rotational, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as ``torch.optim.Optimizer.add_param_group`` does, once its settings have been checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Angles given in radians are meant at this learning rate; group["lr"] is the scheduler's from its first moment.
        group.setdefault("peak_lr", float(group["lr"]))
        try:
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._measure_match_rms()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state, which stays in float32 whatever the parameters' dtype, and moves to their device.

        Also takes the state of the plain optimizer (AdamW's for ``RotationalAdamW``): moments and hyperparameters
        continue, what it lacks keeps this optimizer's settings, and norms are measured at the next step.

        Raises:
            ValueError: for a state that does not fit the parameters, or settings that make no sense here.
        """
        state_dict = dict(state_dict)
        groups = zip(state_dict["param_groups"], self.param_groups, strict=False)
        state_dict["param_groups"] = [{**_settings(own), **saved} for saved, own in groups]
        for saved, own in zip(state_dict["param_groups"], self.param_groups, strict=True):
            self._check({**saved, "params": own["params"]})
        super().load_state_dict(state_dict)
        # torch has cast every tensor but "step" to the parameter's dtype: take them once more from the source.
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    # A copy, so that two optimizers that load one state do not share it.
                    self.state[parameter][name] = value.to(parameter.device, compute_dtype(parameter), copy=True)

    def target_rotation(self, group: Group) -> float:
        """The angle a rotating group aims at with its present learning rate, in radians per step."""
        lr, rotation = float(group["lr"]), group["rotation"]
        if rotation == "equilibrium":
            return self.inner.rotation(group, lr)
        if rotation == "match":
            self._measure_match_rms()
            return self.inner.match_constant(group) * lr / float(group["match_rms"])
        return float(rotation) * lr / float(group["peak_lr"])

    def rotating(self) -> Iterator[tuple[Tensor, Group]]:
        """The tensors that rotate, each with its group."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if neuron_span(parameter, group):
                    yield parameter, group

    def _update(self, parameter: Tensor, group: Group) -> None:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients, and the parameter of shape "
                f"{tuple(parameter.shape)} has one: build the embedding with sparse=False"
            )
        weight = parameter.to(compute_dtype(parameter))
        dims = neuron_span(parameter, group)
        state = self.state[parameter]
        self._prepare_state(state, weight, group, dims)
        state["step"] += 1
        grad = grad.to(weight.dtype)
        update = self.inner.direction(-grad if group["maximize"] else grad, state, group)
        lr = float(group["lr"])
        if dims:
            self._rotate(weight, update, state, group, dims, lr)
        elif lr != 0:
            weight.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr)
        if lr != 0 and weight is not parameter:
            parameter.copy_(weight)

    def _rotate(
        self, weight: Tensor, update: Tensor, state: dict[str, Any], group: Group, dims: tuple[int, ...], lr: float
    ) -> None:
        state["rotation_step"] += 1
        if group["centering"] != "none":
            center_(update, dims)
        if group["centering"] == "weights" and lr != 0 and not state["centered"]:
            center_(weight, dims)
            state["centered"] = True
        rotate_(
            weight,
            update,
            norm=state["norm"],
            update_norm_sq=state["update_norm_sq"],
            step=state["rotation_step"],
            angle=self.target_rotation(group),
            lr=lr,
            decay=group["update_norm_decay"],
            eps=group["rotational_eps"],
            dims=dims,
        )

    def _prepare_state(self, state: dict[str, Any], weight: Tensor, group: Group, dims: tuple[int, ...]) -> None:
        """Makes what is missing, so that moments another optimizer left are taken over as they are."""
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in self.inner.buffers:
            if name not in state:
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        if dims and "norm" not in state:
            start = center_(weight.clone(), dims) if group["centering"] == "weights" else weight
            state["norm"] = neuron_norm(start, dims)
            state["update_norm_sq"] = torch.zeros_like(state["norm"])
            state["rotation_step"] = 0
            if group["centering"] == "weights":
                state["centered"] = False

    def _measure_match_rms(self) -> None:
        groups = [group for group in self.param_groups if group["rotation"] == "match" and group["match_rms"] is None]
        if not groups:
            return
        known = [group["match_rms"] for group in self.param_groups if group["match_rms"] is not None]
        if known:
            rms = known[0]
        else:
            sizes = [rms_of(parameter) for parameter, group in self.rotating() if group["rotation"] == "match"]
            rms = statistics.median([size for size in sizes if size > 0] or [math.inf])
        for group in groups:
            group["match_rms"] = rms

    def _check(self, group: Group) -> None:
        check_group(group)
        self.inner.check(group)
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{type(self).__name__} cannot update a parameter of dtype {parameter.dtype} and shape "
                    f"{tuple(parameter.shape)}: only real floating-point parameters have a rotation"
                )
            rotates = bool(neuron_span(parameter, group))
            if rotates and group["rotation"] == "equilibrium" and group["weight_decay"] == 0:
                raise ValueError(
                    "weight_decay=0 with rotation='equilibrium' makes the target angle 0, so the parameter of shape "
                    f"{tuple(parameter.shape)} would never move. Set weight_decay (it sets the angle: "
                    "hf_rotational.equilibrium), or rotation='match', or rotation=<radians per step>, or put it "
                    "in a group with rotational=False"
                )


def check_group(group: Group) -> None:
    """Checks what every rotational optimizer's group has in common.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    for name in ("lr", "weight_decay", "rotational_eps"):
        check_non_negative(name, float(group[name]))
    if not 0.0 <= group["update_norm_decay"] < 1.0:
        raise ValueError(f"Invalid update_norm_decay: {group['update_norm_decay']} (must be in [0, 1))")
    for name, choices in (("centering", CENTERINGS), ("granularity", GRANULARITIES)):
        if group[name] not in choices:
            raise ValueError(f"Invalid {name}: {group[name]!r} (must be one of {', '.join(choices)})")
    check_rotation(group["rotation"])
    if isinstance(group["rotation"], float | int) and group["peak_lr"] == 0:
        raise ValueError(
            f"rotation={group['rotation']} is an angle at the constructor's learning rate, which must not be 0: lr=0"
        )
    for parameter in group["params"]:
        dims = group["neuron_dims"]
        if group["rotational"] and parameter.ndim >= 2 and not all(-parameter.ndim <= d < parameter.ndim for d in dims):
            raise ValueError(f"Invalid neuron_dims: {dims} for a parameter of shape {tuple(parameter.shape)}")


def check_rotation(rotation: str | float) -> None:
    """Raises ``ValueError`` unless ``rotation`` is a known rule or a positive, finite number of radians per step."""
    is_angle = isinstance(rotation, float | int) and not isinstance(rotation, bool)
    if rotation not in ROTATIONS and not (is_angle and 0 < float(rotation) < math.inf):
        raise ValueError(
            f"Invalid rotation: {rotation!r} (must be one of {', '.join(ROTATIONS)}, "
            "or a number > 0: radians per step at the constructor's learning rate)"
        )


def neuron_span(parameter: Tensor, group: Group) -> tuple[int, ...]:
    """The dims one neuron of ``parameter`` spans; empty if the parameter does not rotate."""
    if not group["rotational"] or parameter.ndim < 2:
        return ()
    tensor_wide = group["granularity"] == "tensor"
    dims = reduced_dims(parameter.ndim, () if tensor_wide else group["neuron_dims"])
    fan_in = math.prod(parameter.shape[dim] for dim in dims)
    # One entry has no direction to turn; nor have two whose sum is held at 0.
    return dims if fan_in >= (3 if group["centering"] == "weights" else 2) else ()


def _settings(group: Group) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """What state is kept and arithmetic is done in: float32, or float64 for float64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def rms_of(tensor: Tensor) -> float:
    """Root mean square of a tensor's entries."""
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)) / math.sqrt(max(tensor.numel(), 1))
