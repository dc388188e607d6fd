"""The base of the rotational optimizers: groups, target angles, state; the step itself is in ``step.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from hf_rotational.optim.groups import check_group, neuron_span, settings
from hf_rotational.optim.inner import Group, Inner
from hf_rotational.optim.kernels import cpu, cuda
from hf_rotational.optim.kernels.base import KernelStep
from hf_rotational.optim.kernels.build import unavailable
from hf_rotational.optim.precision import sum_dtype
from hf_rotational.optim.sharding import REMEDY, Sums, complete, is_sharded, local, split_over
from hf_rotational.optim.state import check_state, take_tensors
from hf_rotational.optim.step import Step

HISTORY = ("step", "rotation_step", "centered", "gain_step", "mean_step")
"""Numbers of a state that must be the same in tensors that are stepped together."""


class RotationalOptimizer(torch.optim.Optimizer):
    """Base of the rotational optimizers: holds norms, imposes the angle, and leaves the direction to ``inner``.

    Tensors with two or more dims rotate unless their group says ``rotational=False``; a group's ``neuron_dims``
    (default ``(0,)``) are the dims that index neurons and its ``rotation_scale`` (default 1) multiplies its angle.
    Vectors, and tensors whose neurons are too small to have a direction (one entry; two with ``centering="weights"``),
    take the plain inner update with the group's weight decay. For rotating tensors weight decay only sets the angle.

    State, made at a tensor's first step, in float32 (float64 for float64 parameters): the inner's moments; ``norm``,
    the norm each neuron is held at; ``update_norm_sq``, the running average of its update's squared size.

    A NaN or infinite gradient entry makes its own neuron NaN (with ``granularity="tensor"``: its tensor), as it would
    make its entry with the plain optimizer (Lion takes the sign of NaN for 0, and the neuron goes on without that
    entry). Other neurons are not touched. A neuron that starts at norm 0 takes the plain update without weight decay.
    A step with ``lr == 0`` updates the state and leaves the weights bit for bit.

    Args:
        params: parameters, or groups of them, as for any ``torch.optim`` optimizer.
        defaults: the inner's hyperparameters, with ``lr`` and ``weight_decay``.
        rotation: target angle. ``"equilibrium"``: the paper's, from learning rate and weight decay, so it follows a
            schedule as its root. ``"match"``: AdamW's steady angle at this learning rate and momentum, one for the
            whole model: ``2 sqrt((1-b1)/(1+b1)) lr / median(rms(weight))`` over the rotating tensors before their
            first step. A number: radians per step at the constructor's learning rate, in proportion with a schedule.
        update_norm_decay: decay of the running average of the update's size, in [0, 1) (paper, algorithm 1). Where it
            forgets faster than momentum does, steps in which a neuron has no gradient do not count, so that such a
            neuron comes to rest instead of turning on stale momentum.
        rotational_eps: added to the update's size before dividing by it.
        centering: ``"updates"`` takes the mean out of each neuron's updates; ``"weights"`` also out of the weights,
            once, before they first move (a pretrained model then computes something else); ``"learned"`` takes it out
            of the rotation and trains it as a parameter of its own; ``"none"`` does nothing.
        gains: ``"fixed"`` holds every norm; ``"learned"`` trains it by the inner update, as a parameter of its own
            that starts where it is, while the direction rotates: the same as a gain in the module
            (:mod:`hf_rotational.optim.gains`). With ``centering="weights"`` that is weight standardization with
            gains, with ``"learned"`` weight standardization that keeps a pretrained model's function. A gain may
            pass through 0: the neuron then turns over, as a module's gain makes it.
        gain_lr_multiplier: factor on the learning rate for learned gains and means.
        gain_weight_decay: of learned gains and means.
        granularity: hold the norm and set the angle of each ``"neuron"``, or of each ``"tensor"`` as a whole.
        rounding: of 16-bit parameters: ``"nearest"``, ``"kahan"`` or ``"stochastic"``
            (:mod:`hf_rotational.optim.precision`). Arithmetic and state are float32 with each.
        transient_correction: divide each update's size by what it is expected to be so early in a run. The algorithm
            as published is off target there (AdamW 0.67 times at step 10, SGD with momentum 1.17 times at step 3). For
            independent gradients; for Adam, whose second moment sees the weights too, approximately.
        backend: ``"fused"`` steps float32 weights on a CPU in one pass over memory, by a kernel that the system's C
            compiler builds at the first step, weights on CUDA devices by a Triton kernel, and what these cannot step
            as ``"auto"`` would (docs/speed.md); ``"eager"`` works tensor by tensor, with little memory; ``"foreach"``
            on all tensors of a shape at once, with few kernel launches; on a CPU both work in blocks that fit its
            cache; ``"auto"`` takes foreach on accelerators and fused on CPUs, without a compiler eager.
        capturable: whether CUDA graphs may capture ``step()``: steps are counted on the device, and a learning rate
            that is a float32 tensor on it is read there at every replay (a number is the one it was captured with).
            With ``backend="fused"``; two steps have to be taken before (docs/speed.md).
        maximize: step uphill.

    Raises:
        ValueError: for an argument out of range, a rotating group whose target angle would be 0, or
            ``backend="fused"`` where the kernel cannot be had.
    """

    inner: ClassVar[Inner]
    """Where directions come from."""
    _shapes: list[list[torch.Size]]
    """Of each group's matrices when it was added."""
    _seen: list[list[torch.Size]] | None
    """Shapes of all parameters when they were last found whole."""
    _kernels: tuple[KernelStep, ...]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._kernels, self._seen = (cpu.FusedStep(self.inner), cuda.FusedStep(self.inner)), None
        self._shapes = [matrix_shapes(group) for group in self.param_groups]

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
        rounding: str = "nearest",
        transient_correction: bool = False,
        gains: str = "fixed",
        gain_lr_multiplier: float = 1.0,
        gain_weight_decay: float = 0.0,
        backend: str = "auto",
        capturable: bool = False,
        maximize: bool = False,
    ) -> None:
        rotational = {
            "rotation": rotation,
            "update_norm_decay": update_norm_decay,
            "rotational_eps": rotational_eps,
            "centering": centering,
            "granularity": granularity,
            "rounding": rounding,
            "transient_correction": transient_correction,
            "gains": gains,
            "gain_lr_multiplier": gain_lr_multiplier,
            "gain_weight_decay": gain_weight_decay,
            "rotational": True,
            "neuron_dims": (0,),
            "rotation_scale": 1.0,
            # rms(weight) that rotation="match" divides by: measured once, then part of every checkpoint.
            "match_rms": None,
            "backend": backend,
            "capturable": capturable,
        }
        self._kernels, self._seen = (cpu.FusedStep(self.inner), cuda.FusedStep(self.inner)), None
        super().__init__(params, {**defaults, **rotational, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as ``torch.optim.Optimizer.add_param_group`` does, once its settings have been checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        vars(self).setdefault("_shapes", []).append(matrix_shapes(group))
        try:
            # Angles in radians are meant at this learning rate; group["lr"] is the scheduler's from its first moment.
            group.setdefault("peak_lr", float(group.get("initial_lr", group["lr"])))
            self._check(group)
        except Exception:
            self.param_groups.pop()
            self._shapes.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step. A first one on gradients that are all 0 does nothing.

        Args:
            closure: re-evaluates the model and returns the loss.

        Raises:
            RuntimeError: for a sparse gradient, for parameters that have been flattened or cut up, and for what cannot
                go into a CUDA graph while one is captured.
        """
        cuda.check_capture(self.param_groups, self.state)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_whole()
        if self._is_rehearsal():
            return loss
        self._before_step()
        rest: list[list[Tensor]] = [group["params"] for group in self.param_groups]
        for kernel in self._kernels:
            rest = kernel.step(self.param_groups, rest, self.state, self.target_rotation)
            if not any(rest):
                return loss
        cuda.check_captured(rest)
        places = {parameter: place for place, (parameter, _) in enumerate(self._members())}
        complete(
            (
                Step(self.inner, group, dims, self.target_rotation(group) if dims else 0.0).take(
                    parameters, [self.state[parameter] for parameter in parameters], [places[p] for p in parameters]
                ),
                split_over(parameters[0], dims),
            )
            for group, left in zip(self.param_groups, rest, strict=True)
            for parameters, dims in self._alike(group, left)
        )
        self._after_step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state, which stays in float32 whatever the parameters' dtype, and moves it to their device.

        Also takes the state of the plain optimizer (AdamW's for ``RotationalAdamW``) over the same groups of
        parameters: moments and hyperparameters continue, what it lacks keeps this optimizer's settings, and norms are
        measured at the next step. Groups that differ: :meth:`take_over`.

        Raises:
            ValueError: for a state that does not fit the parameters, or settings that make no sense here.
        """
        source = state_dict

        def merge(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            nonlocal source
            source = self._merged(given)
            return source

        def take(_: torch.optim.Optimizer) -> None:
            # torch has cast every tensor but "step" to the parameter's dtype: take them once more from the source.
            places = [place for group in source["param_groups"] for place in group["params"]]
            for place, (parameter, _group) in zip(places, self._members(), strict=True):
                # No state where there is none: under FSDP2 Accelerate loads an empty one, then replaces the parameters.
                if place in source["state"]:
                    take_tensors(self.state[parameter], source["state"][place], parameter)

        # Between the user's hooks: after those that may change the dict, before those that see the result.
        hooks = (
            self.register_load_state_dict_pre_hook(merge),
            self.register_load_state_dict_post_hook(take, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Continues from the moments of a running plain optimizer over the same parameters, however grouped.

        Hyperparameters stay as they are here; norms are measured at the next step.

        Raises:
            ValueError: if it has state of parameters that are not here, or settings that make no sense here.
        """
        own = {parameter for parameter, _ in self._members()}
        strangers = [tuple(parameter.shape) for parameter in optimizer.state if parameter not in own]
        if strangers:
            raise ValueError(f"{type(optimizer).__name__} has state of parameters not here, of shapes {strangers}")
        for group in optimizer.param_groups:
            self.inner.check({**self.defaults, **settings(group)})
        groups = dict(self._members())
        for parameter, state in optimizer.state.items():
            check_state(state, parameter, groups[parameter], self.inner, type(self).__name__)
        for parameter, state in optimizer.state.items():
            self.state[parameter] = dict(state)
            take_tensors(self.state[parameter], state, parameter)

    def target_rotation(self, group: Group) -> float:
        """The angle a rotating group aims at with its present learning rate, in radians per step."""
        lr, rotation = float(group["lr"]), group["rotation"]
        if rotation == "equilibrium":
            angle = self.inner.rotation(group, lr)
        elif rotation == "match":
            self._measure_match_rms()
            momentum = self.inner.momentum(group)
            # Independent updates would give sqrt((1-b1)/(1+b1)); those of fine-tuning are larger (docs/equilibrium.md).
            angle = 2 * math.sqrt((1 - momentum) / (1 + momentum)) * lr / float(group["match_rms"])
        else:
            angle = float(rotation) * lr / float(group["peak_lr"])
        return float(group["rotation_scale"]) * angle

    def rotating(self) -> Iterator[tuple[Tensor, Group]]:
        """The tensors that rotate, each with its group."""
        return ((parameter, group) for parameter, group in self._members() if neuron_span(parameter, group))

    def _before_step(self) -> None:
        self._measure_match_rms()

    def _after_step(self) -> None:
        """For what may go once every parameter has been stepped."""

    def _check_whole(self) -> None:
        """Refuses to take pieces for what they are of: a plausible update, but not of their neurons."""
        now = [[parameter.shape for parameter in group["params"]] for group in self.param_groups]
        if now == self._seen:
            return
        if len(self._shapes) != len(self.param_groups):  # a group has been taken out of the list
            self._shapes = [matrix_shapes(group) for group in self.param_groups]
        for group, shapes in zip(self.param_groups, self._shapes, strict=True):
            left = matrix_shapes(group)
            if left[: len(shapes)] != shapes:
                changed = [before for before, now in zip_longest(shapes, left) if before != now]
                raise RuntimeError(
                    f"{len(changed)} matrices of a parameter group, the first of shape {tuple(changed[0])}, have lost "
                    "the shape they were added with: they were flattened or cut up, as DeepSpeed does (ZeRO, AutoTP), "
                    f"and neurons cannot be told in the pieces. {REMEDY}"
                )
        for kernel in self._kernels:
            kernel.forget()
        self._seen = now

    def _is_rehearsal(self) -> bool:
        """Whether this is no step of training but one that is to make state: DeepSpeed takes it, and it would count."""
        return not any(self.state.values()) and all(
            float(group["lr"]) != 0  # torch.distributed.checkpoint takes one at 0, and needs the state
            and not is_sharded(parameter)  # ranks would have to agree
            and parameter.grad is not None
            and not parameter.grad.is_sparse
            and not parameter.grad.any()
            for parameter, group in self._members()
        )

    def _members(self) -> Iterator[tuple[Tensor, Group]]:
        return ((parameter, group) for group in self.param_groups for parameter in group["params"])

    def _alike(self, group: Group, parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], tuple[int, ...]]]:
        """Those of a group's parameters that have a gradient, in lists that can step together, with the dims they
        span."""
        together = group["backend"] != "eager"
        buckets: dict[Any, list[Tensor]] = {}
        spans: dict[torch.Size, tuple[int, ...]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            shape = parameter.shape
            if shape not in spans:
                spans[shape] = neuron_span(parameter, group)
            dims = spans[shape]
            key: Any = (dims, parameter)
            # On a CPU eager does as well: it takes its steps in blocks, and those hold many small tensors.
            if together or parameter.device.type == "cpu":
                state = self.state[parameter]
                # Rotating tensors are stacked, so they must also agree in shape.
                history = tuple([int(state[name]) for name in HISTORY if name in state])
                spread = (parameter.placements, parameter.device_mesh) if is_sharded(parameter) else None  # type: ignore[attr-defined]
                like = (dims, parameter.device, parameter.dtype, spread, history, tuple(state))
                key = (*like, shape) if dims else like
            buckets.setdefault(key, []).append(parameter)
        for key, parameters in buckets.items():
            yield parameters, key[0]

    def _measure_match_rms(self) -> None:
        groups = [group for group in self.param_groups if group["rotation"] == "match"]
        if all(group["match_rms"] is not None for group in groups):
            return
        known = [group["match_rms"] for group in groups if group["match_rms"] is not None]
        sizes = rms_of([parameter for parameter, group in self.rotating() if group["rotation"] == "match"])
        # A group that is added later turns as the first ones do.
        rms = known[0] if known else statistics.median([size for size in sizes if size > 0] or [math.inf])
        for group in groups:
            group["match_rms"] = rms

    def _merged(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict with this optimizer's settings where it has none, once it has been checked."""
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            return state_dict  # torch will say so
        merged = [{**settings(own), **saved} for own, saved in zip(self.param_groups, saved_groups, strict=True)]
        for saved, own in zip(merged, self.param_groups, strict=True):
            for place, parameter in zip(saved["params"], own["params"], strict=False):  # torch compares the lengths
                state = state_dict["state"].get(place, {})
                check_state(state, parameter, {**saved, **settings(own)}, self.inner, type(self).__name__)
            self._check({**saved, "params": own["params"]})
        return {**state_dict, "param_groups": merged}

    def _check(self, group: Group) -> None:
        if group["backend"] == "fused":
            devices = {parameter.device.type for parameter in group["params"]}
            for device, kernel_is in (("cpu", unavailable), (cuda.DEVICE, cuda.unavailable)):
                if device in devices and (reason := kernel_is()):
                    raise ValueError(f"Invalid backend: 'fused' (must be 'auto' or 'eager' on this machine: {reason})")
        check_group(group)
        self.inner.check(group)
        if group["capturable"] and self.inner.counts_steps:
            if group["transient_correction"]:
                raise ValueError("Invalid capturable: True with transient_correction=True (worked out on the host)")
            if isinstance(group["lr"], Tensor) and group["lr"].dtype != torch.float32:
                raise ValueError(f"Invalid lr: a tensor of {group['lr'].dtype} (must be float32 with capturable=True)")


def matrix_shapes(group: Group) -> list[torch.Size]:
    """Shapes of a group's parameters that have the two dims it takes to rotate."""
    return [parameter.shape for parameter in group["params"] if parameter.ndim >= 2]


def rms_of(parameters: list[Tensor]) -> list[float]:
    """Root mean square of each parameter's entries, on all ranks."""
    sizes = [0.0] * len(parameters)

    def measure(place: int, parameter: Tensor) -> Sums[None]:
        part = torch.linalg.vector_norm(local(parameter.detach()), dtype=sum_dtype(parameter))
        sizes[place] = math.sqrt(float((yield part.square())) / max(parameter.numel(), 1))

    complete(
        (measure(place, parameter), split_over(parameter, tuple(range(parameter.ndim))))
        for place, parameter in enumerate(parameters)
    )
    return sizes
