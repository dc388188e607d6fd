"""What to tell the user about measured steps, each thing once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

FACTOR = 2.0
"""Measured over target angle, or its inverse, from which on they are said to differ. A healthy run begins below its
target: at 0.67 of it around the tenth step, with AdamW's direction."""
DRIFT = 1e-3
"""Relative change of a norm that rotation should hold."""
STILL = 1e-3
"""Angle of a layer relative to the model's, below which the layer is said not to turn."""
PATIENCE = 3
"""Measured steps in a row that have to show a fault: one may be chance, or the start of a run."""


def holds_norms(group: Mapping[str, Any]) -> bool:
    """Whether an optimizer with the settings of this group leaves norms as they are."""
    return group.get("gains", "fixed") == "fixed" and group.get("centering") != "learned"


class Adviser:
    """Looks at records of measured steps, and says what is wrong with them and what to do.

    Args:
        say: takes a sentence; called once for each kind of fault (layers that do not turn: once for each layer).
        low_precision: whether weights are 16 bits wide, which is then the likely reason for angles off target.
        holds_norms: whether norms should stay as they are; learned gains move them.
    """

    def __init__(self, say: Callable[[str], None], low_precision: bool, holds_norms: bool = True) -> None:
        self._say = say
        self._low_precision = low_precision
        self._holds_norms = holds_norms
        self._streaks: dict[str, int] = {}
        self._norms: dict[str, float] = {}

    def look(self, record: dict[str, Any]) -> None:
        """Takes one more record into account."""
        step, rotation, target = record["step"], record["rotation"], record["target"]
        if not record["learning_rate"] or rotation is None:
            return
        if self._lasts("zero", target == 0):
            self._say(f"the target angle is 0 at step {step}: nothing rotates. Set weight_decay, or rotation='match'")
        if self._lasts("rest", rotation == 0 and target != 0):
            self._say(f"no neuron turned at step {step}: {self._why_at_rest()}")
        ratio = rotation / target if target and rotation else 1.0
        # Rounded stochastically, single steps of 16-bit weights are larger than their sum's share: that is no fault.
        off_target = ratio <= 1 / FACTOR or (ratio >= FACTOR and not self._low_precision)
        if self._lasts("target", off_target):
            self._say(f"measured rotation is {ratio:.2g} times the target at step {step}: {self._why_off_target()}")
        layers = {name: layer for name, layer in record["layers"].items() if layer["angle"] is not None}
        self._look_for_still(layers, rotation, step)
        if self._holds_norms:
            self._look_for_drift(layers, step)

    def _look_for_still(self, layers: dict[str, Any], rotation: float, step: int) -> None:
        still = [
            name
            for name, layer in layers.items()
            if self._lasts(f"still {name}", layer["angle"][0] < STILL * rotation and layer["target"] != 0)
        ]
        if still:
            what = still[0] if len(still) == 1 else f"{len(still)} layers ({', '.join(still)})"
            self._say(f"no turning of {what} at step {step}: is the gradient 0? Else leave it out (rotation_exclude)")

    def _look_for_drift(self, layers: dict[str, Any], step: int) -> None:
        drifts = {
            name: layer["norm"][0] / self._norms.setdefault(name, layer["norm"][0]) - 1
            for name, layer in layers.items()
            if layer["target"] is not None and layer["norm"] is not None
        }
        worst = max(drifts, key=lambda name: abs(drifts[name]), default=None)
        if self._lasts("drift", worst is not None and abs(drifts[worst]) > DRIFT) and worst is not None:
            self._say(
                f"the mean norm of {worst} has drifted by {drifts[worst]:+.1%} at step {step}, which rotation should "
                f"hold: {self._why_drifting()}"
            )

    def _why_at_rest(self) -> str:
        if self._low_precision:
            return "are gradients 0, or steps too small for 16-bit weights? rounding='kahan' would keep those"
        return "are gradients 0?"

    def _why_off_target(self) -> str:
        if self._low_precision:
            return "16-bit weights cannot hold such small steps; set rounding='kahan' (--rotation_rounding kahan)"
        return "gradients changed size faster than update_norm_decay forgets; lower it, or clip gradients"

    def _why_drifting(self) -> str:
        if self._low_precision:
            return "16-bit weights round every step; set rounding='kahan' (--rotation_rounding kahan)"
        return "does anything else change the weights?"

    def _lasts(self, fault: str, seen: bool) -> bool:
        """Whether a fault has now been seen often enough in a row, for the first time."""
        streak = self._streaks.get(fault, 0)
        # A fault that has been told of stays at PATIENCE: its streak can not be completed again.
        self._streaks[fault] = streak if streak == PATIENCE else (streak + 1 if seen else 0)
        return streak < PATIENCE == self._streaks[fault]
