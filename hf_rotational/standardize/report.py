"""What standardizing would do to each weight, before it is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_rotational.neurons import PlannedParameter, table
from hf_rotational.standardize.parametrization import Standardization


@dataclass(frozen=True)
class LayerReport:
    """What would become of one parameter."""

    name: str
    """Name in ``model.named_parameters()``."""
    module_type: str
    """Class name of the module that owns it."""
    shape: tuple[int, ...]
    neuron_dims: tuple[int, ...]
    """Dims that index neurons; empty if it is left as it is."""
    reason: str
    """Why it is standardized, or why not."""
    weight_change: float = 0.0
    """Norm of the change over the norm of the weight. Outputs for inputs of mean 0 change as much, relative to their
    RMS (independent entries of one variance)."""
    output_change: float = 0.0
    """RMS of the change of the outputs, relative to their RMS, for inputs of mean 1 and variance 1 (independent
    entries)."""

    @property
    def standardized(self) -> bool:
        """Whether it would be standardized."""
        return bool(self.neuron_dims)


@dataclass(frozen=True)
class StandardizationReport:
    """What :func:`~hf_rotational.standardize.standardize` would do; prints as a table."""

    mode: str
    layers: tuple[LayerReport, ...]

    @property
    def standardized(self) -> tuple[LayerReport, ...]:
        """The entries that would be standardized."""
        return tuple(layer for layer in self.layers if layer.standardized)

    def summary(self) -> str:
        """One line: how many weights, and the largest change."""
        done = self.standardized
        largest = max(done, key=lambda layer: layer.output_change, default=None)
        ending = f"; largest output change {largest.output_change:.2g} ({largest.name})" if largest else ""
        return f"mode={self.mode!r}: {len(done)} of {len(self.layers)} tensors standardized{ending}"

    def __str__(self) -> str:
        header = ("parameter", "module", "shape", "neurons", "weight change", "output change", "standardized")
        rows = [
            (
                layer.name,
                layer.module_type,
                "x".join(map(str, layer.shape)),
                ",".join(map(str, layer.neuron_dims)) or "-",
                f"{layer.weight_change:.2g}" if layer.standardized else "-",
                f"{layer.output_change:.2g}" if layer.standardized else "-",
                ("yes: " if layer.standardized else "no: ") + layer.reason,
            )
            for layer in self.layers
        ]
        return f"{table(header, rows)}\n\n{self.summary()}"


def left_alone(entry: PlannedParameter, reason: str) -> LayerReport:
    """The report on a parameter that stays as it is."""
    return LayerReport(entry.name, entry.module_type, tuple(entry.parameter.shape), (), reason)


@torch.no_grad()
def layer_report(entry: PlannedParameter, mode: str) -> LayerReport:
    """The report on a parameter that is standardized."""
    standardization = Standardization(entry.parameter, entry.neuron_dims, mode)
    weights = entry.parameter, standardization.weight(entry.parameter)
    before, after = (standardization.rows(weight).double() for weight in weights)
    change = after - before
    return LayerReport(
        entry.name,
        entry.module_type,
        tuple(entry.parameter.shape),
        entry.neuron_dims,
        entry.reason,
        weight_change=_ratio(change.square().sum(), before.square().sum()),
        # The square of w x has the mean |w|^2 + (sum of w)^2, since the mean of x x' is 1 + 1 1'.
        output_change=_ratio(_mean_square_output(change), _mean_square_output(before)),
    )


def _mean_square_output(rows: Tensor) -> Tensor:
    return rows.square().sum() + rows.sum(dim=1).square().sum()


def _ratio(change: Tensor, whole: Tensor) -> float:
    return float((change / whole).sqrt())
