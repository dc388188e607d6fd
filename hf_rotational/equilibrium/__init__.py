"""Rotational equilibrium: what weight decay makes every neuron do, for each inner optimizer.

Gradient steps push the norm of a neuron's weight vector up, weight decay pulls it down. The two settle at a steady
norm and a steady expected angle per step (paper, section 3).

- :func:`adamw`, :func:`adam_l2`, :func:`sgdm`, :func:`lion`: the steady state in closed form, for numbers and arrays.
- :mod:`~hf_rotational.equilibrium.inverse`: the weight decay or learning rate that gives a wanted angle.
- :func:`simulate`: the random walk that the closed forms are about, to check them against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_rotational.equilibrium import inverse
from hf_rotational.equilibrium.closed_forms import Equilibrium, adam_l2, adamw, lion, sgdm

if TYPE_CHECKING:
    from hf_rotational.equilibrium.simulation import Walk, simulate

__all__ = ["Equilibrium", "Walk", "adam_l2", "adamw", "inverse", "lion", "sgdm", "simulate"]


def __getattr__(name: str) -> Any:
    # The closed forms are all an optimizer needs, and they do without numpy.
    if name in ("Walk", "simulate"):
        from hf_rotational.equilibrium import simulation

        return getattr(simulation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
