"""A rotational variant of any torch optimizer: its own step, with weight decay off, is the direction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from hf_rotational.optim import inner as inners
from hf_rotational.optim.gains import learns
from hf_rotational.optim.groups import neuron_span, settings
from hf_rotational.optim.inner import Group, State, Tensors
from hf_rotational.optim.optimizer import RotationalOptimizer
from hf_rotational.optim.optimizers import OptimizerOptions
from hf_rotational.optim.precision import compute_dtype, prepare, read, write
from hf_rotational.optim.state import take_tensors

CLOSED_FORMS: dict[str, inners.Inner] = {
    **dict.fromkeys(("AdamW", "Adam", "NAdam", "RAdam"), inners.AdamW()),
    "SGD": inners.SGD(),
    "Lion": inners.Lion(),
}
"""Optimizer class name to the inner whose equilibrium angle it is given; others have no closed form."""

_UPDATE = "update"
"""State key under which the wrapped optimizer's update waits for its rotation, within one step."""


@overload
def rotational(optimizer: type[Optimizer]) -> type[RotationalOptimizer]: ...
@overload
def rotational(optimizer: Optimizer, **options: Unpack[OptimizerOptions]) -> RotationalOptimizer: ...
def rotational(
    optimizer: type[Optimizer] | Optimizer, **options: Any
) -> type[RotationalOptimizer] | RotationalOptimizer:
    """The rotational variant of a torch optimizer.

    Its own step gives the direction: for tensors that rotate it runs with learning rate 1 and weight decay 0, on
    float32 copies of 16-bit parameters, and what it did is turned into a rotation; the other tensors take its step as
    it is. A step needs memory for one copy of the rotating weights.

    Example::

        optimizer = rotational(torch.optim.NAdam)(plan(model).parameter_groups(), lr=1e-3, rotation="match")
        optimizer = rotational(torch.optim.NAdam(plan(model).parameter_groups(), lr=1e-3), rotation=0.01)

    Args:
        optimizer: a class, of which the rotational class is returned (it takes the same arguments, and
            ``RotationalOptimizer``'s keyword arguments), or an instance, whose groups and state are continued.
            Schedulers must be made for the optimizer returned.
        **options: for an instance, ``RotationalOptimizer``'s keyword arguments but ``capturable`` and ``maximize``.

    Raises:
        ValueError: for an optimizer that is rotational already or re-evaluates the loss (LBFGS), and what
            ``RotationalOptimizer`` raises; ``rotation="equilibrium"`` has a closed form only for
            AdamW, Adam (AdamW's), NAdam, RAdam, SGD and Lion.
    """
    cls: type = optimizer if isinstance(optimizer, type) else type(optimizer)
    if not issubclass(cls, Optimizer) or issubclass(cls, (RotationalOptimizer, LBFGS)):
        raise ValueError(f"Invalid optimizer: {cls.__name__} (must be a torch optimizer, not rotational, not LBFGS)")
    wrapper = _wrapper(cls)
    if isinstance(optimizer, type):
        if options:
            raise ValueError(f"options {sorted(options)} belong to the constructor of {wrapper.__name__}")
        return wrapper
    wrapped = wrapper.__new__(wrapper)
    wrapped._wrap(optimizer, options)
    return wrapped


class _WrappedInner(inners.Inner):
    """Closed forms of the wrapped optimizer; its directions come from its own step."""

    decoupled = True
    counts_steps = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed_form = CLOSED_FORMS.get(name)

    def buffers(self, group: Group) -> tuple[str, ...]:
        return ()

    def check(self, group: Group) -> None:
        if learns(group):
            raise ValueError(
                f"gains={group['gains']!r} with centering={group['centering']!r} would train gains or means, which "
                f"rotational({self.name}) cannot, since {self.name} takes its own step: make them parameters of the "
                "model (hf_rotational.standardize(model, mode='gain' or 'function_preserving'))"
            )
        if self.closed_form is None and group["rotation"] == "equilibrium":
            raise ValueError(
                f"rotation='equilibrium' has no closed form for {self.name}: set rotation='match' or "
                "rotation=<radians per step>"
            )

    def directions_into(
        self, updates: Tensors, grads: Tensors, weights: Tensors, states: list[State], group: Group, *, rotates: bool
    ) -> None:
        torch._foreach_copy_(updates, [state[_UPDATE] for state in states])

    def rotation(self, group: Group, lr: float) -> float:
        assert self.closed_form is not None
        return self.closed_form.rotation(group, lr)

    def momentum(self, group: Group) -> float:
        return float(group["betas"][0] if "betas" in group else group.get("momentum", 0.0))

    def relative_size_sq(self, group: Group, step: int) -> float:
        return 1.0 if self.closed_form is None else self.closed_form.relative_size_sq(group, step)


class _WrappedOptimizer(RotationalOptimizer):
    """Lets ``base_class`` take its own step, and turns what it did to rotating tensors into a rotation."""

    base_class: ClassVar[type[Optimizer]]

    def __init__(self, params: ParamsT, *args: Any, **kwargs: Any) -> None:
        own = OptimizerOptions.__optional_keys__ - {"capturable", "maximize"}
        options = {name: kwargs.pop(name) for name in tuple(kwargs) if name in own}
        self._wrap(self.base_class(params, *args, **kwargs), options)

    def _wrap(self, base: Optimizer, options: dict[str, Any]) -> None:
        if base.defaults.get("lr") is None:
            raise ValueError(f"Invalid lr: {base.defaults.get('lr')} ({type(base).__name__} must be given one here)")
        self._base = base
        groups = [dict(group) for group in base.param_groups]
        defaults = {"weight_decay": 0.0, **base.defaults}
        super().__init__(groups, defaults, maximize=bool(base.defaults.get("maximize", False)), **options)
        self.state = base.state
        # What it has already, of a run or from its constructor, goes on in float32.
        for parameter, state in self.state.items():
            take_tensors(state, dict(state), parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_base": self._base}

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return _blank, (self.base_class,), self.__getstate__()

    def _alike(self, group: Group, parameters: list[Tensor]) -> Iterator[tuple[list[Tensor], tuple[int, ...]]]:
        # What does not rotate has had its step before.
        return ((alike, dims) for alike, dims in super()._alike(group, parameters) if dims)

    def _before_step(self) -> None:
        super()._before_step()
        parts = [(group, part) for group in self.param_groups for part in _parts(group)]
        self._base.state = self.state
        self._base.param_groups = [part for _, part in parts]
        with ExitStack() as swapped:
            for place, (parameter, group) in enumerate(self._members()):
                if parameter.grad is not None and compute_dtype(parameter) != parameter.dtype:
                    moves = float(group["lr"]) != 0 and not neuron_span(parameter, group)
                    state, rounding = self.state[parameter], group["rounding"]
                    swapped.enter_context(_in_float32(parameter, state, rounding, place, moves=moves))
            before = {
                parameter: parameter.detach().clone() for parameter, _ in self.rotating() if parameter.grad is not None
            }
            self._base.step()
            for parameter, weight in before.items():
                self.state[parameter][_UPDATE] = weight - parameter.detach()
                parameter.copy_(weight)
        for group, part in parts:
            # Some optimizers keep numbers of theirs in the group.
            group.update({name: value for name, value in settings(part).items() if name not in _FREE_STEP})

    def _after_step(self) -> None:
        for parameter, _ in self.rotating():
            self.state.get(parameter, {}).pop(_UPDATE, None)


_FREE_STEP = {"lr": 1.0, "weight_decay": 0.0}
"""What the wrapped optimizer runs with where its step is only a direction. At learning rate 1 the difference of two
weights still has the update's leading digits, which at 1e-5 it would not."""


def _parts(group: Group) -> Iterator[Group]:
    """The group as the wrapped optimizer is to see it: what rotates apart from what does not."""
    rotates = [bool(neuron_span(parameter, group)) for parameter in group["params"]]
    for kind, changes in ((False, {}), (True, _FREE_STEP)):
        chosen = [parameter for parameter, is_kind in zip(group["params"], rotates, strict=True) if is_kind is kind]
        if chosen:
            yield {**group, **changes, "params": chosen}


@contextmanager
def _in_float32(parameter: Tensor, state: State, rounding: str, place: int, *, moves: bool) -> Iterator[None]:
    """Within, a 16-bit parameter and its gradient are float32; afterwards it holds the result, rounded, if it moves."""
    data, grad = parameter.data, parameter.grad
    assert grad is not None
    weight = read(data, state, rounding)
    # A gradient must have its parameter's dtype at every moment.
    parameter.grad = None
    parameter.data, parameter.grad = weight, grad.to(weight.dtype)
    try:
        yield
        weight = parameter.data
    finally:
        parameter.grad = None
        parameter.data, parameter.grad = data, grad
    draws = prepare(parameter, state, rounding, place, moves=moves)
    if moves:  # else rounding the same weight once more could change the parameter
        write(parameter, weight, state, rounding, draws)


_WRAPPERS: dict[type[Optimizer], type[_WrappedOptimizer]] = {}


def _wrapper(base: type[Optimizer]) -> type[_WrappedOptimizer]:
    """The one class that wraps ``base``."""
    if base in _WRAPPERS:
        return _WRAPPERS[base]
    namespace = {
        "base_class": base,
        "inner": _WrappedInner(base.__name__),
        "__doc__": f"Rotational variant of :class:`{base.__module__}.{base.__name__}`; see ``RotationalOptimizer``.",
        "__module__": __name__,
    }
    return _WRAPPERS.setdefault(base, type(f"Rotational{base.__name__}", (_WrappedOptimizer,), namespace))


def _blank(base: type[Optimizer]) -> _WrappedOptimizer:
    """An instance for ``__setstate__`` to fill: pickle cannot find a class that was made at run time by its name."""
    cls = _wrapper(base)
    return cls.__new__(cls)
