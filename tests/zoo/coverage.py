"""Plans architectures one by one, proves every kind of rotating parameter once, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from hf_rotational import plan
from hf_rotational.layouts import UNKNOWN
from tests.zoo.axis import NotProbed, changes_one_feature
from tests.zoo.small_models import MAX_SECONDS, build, quiet, time_limit

Kind = tuple[str, str, tuple[int, ...], bool]
"""Module class, parameter, neuron dims, grouped or not: what the plan's decision hangs on."""


@dataclass
class Coverage:
    """What was found."""

    built: dict[str, str] = field(default_factory=dict)
    """Model class to the device it was built on."""
    not_built: dict[str, str] = field(default_factory=dict)
    """Model class to what stopped it."""
    rotating: Counter[str] = field(default_factory=Counter)
    """Module class and parameter to how many rotate."""
    left: Counter[str] = field(default_factory=Counter)
    """Reason to how many do not."""
    unknown: Counter[str] = field(default_factory=Counter)
    """Module class and parameter, of those with two or more dims and no layout, to how many there are."""
    proved: set[Kind] = field(default_factory=set)
    wrong: dict[Kind, str] = field(default_factory=dict)
    """What the numerical test says against the plan."""
    unproved: dict[Kind, str] = field(default_factory=dict)
    """Why the numerical test could not run."""

    def add(self, class_name: str) -> None:
        """Builds one architecture, plans it, and proves what is new in it. An error of the plan passes through."""
        try:
            with time_limit(MAX_SECONDS):
                model = build(class_name)
        except Exception as error:
            self.not_built[class_name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return
        device = next(model.parameters()).device.type
        self.built[class_name] = device
        for entry in plan(model):
            owner, _, name = entry.name.rpartition(".")
            kind = f"{entry.module_type}.{name}"
            dims = entry.neuron_dims
            if entry.rotates:
                self.rotating[kind] += 1
            else:
                self.left[entry.reason] += 1
                self.unknown[kind] += entry.reason == UNKNOWN
            if dims and device == "cpu":
                self._prove(model, owner, name, dims)

    def _prove(self, model: nn.Module, owner: str, name: str, dims: tuple[int, ...]) -> None:
        module = model.get_submodule(owner)
        kind = (type(module).__name__, name, dims, getattr(module, "groups", 1) > 1)
        if kind in self.proved or kind in self.wrong:
            return
        try:
            objection = changes_one_feature(model, owner, name, dims)
        except NotProbed as error:
            self.unproved[kind] = str(error)
            return
        self.unproved.pop(kind, None)
        if objection is None:
            self.proved.add(kind)
        else:
            self.wrong[kind] = f"{owner}.{name} of {type(model).__name__}: {objection}"


def cover(class_names: Iterable[str]) -> Coverage:
    """Goes through model classes by name."""
    quiet()
    coverage = Coverage()
    for class_name in class_names:
        coverage.add(class_name)
    return coverage
