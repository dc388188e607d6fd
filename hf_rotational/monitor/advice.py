"""What to tell the user about measured steps, each thing once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FACTOR = 1.5
"""Measured over target angle, or its inverse, from which on they are said to differ."""
DRIFT = 1e-3
"""Relative change of a norm that rotation should hold."""
PATIENCE = 3
"""Measured steps in a row that have to show a fault: one may be chance, or the start of a run."""


class Adviser:
    """Looks at records of measured steps, and says what is wrong with them and what to do.

    Args:
        say: takes a sentence; called once for each kind of fault (a layer that does not turn: for each layer).
        low_precision: whether weights are 16 bits wide, which is then the likely reason for angles off target.
    """

    def __init__(self, say: Callable[[str], None], low_precision: bool) -> None:
        self._say = say
        self._low_precision = low_precision
        self._streaks: dict[str, int] = {}
        self._said: set[str] = set()
        self._norms: dict[str, float] = {}

    def look(self, record: dict[str, Any]) -> None:
        """Takes one more record into account."""
        step, target = record["step"], record["target"]
        if not record["learning_rate"]:
            return
        if target is not None:
            self._check(
                "zero",
                target == 0,
                f"the target angle is 0 at step {step}: nothing rotates. Set weight_decay, or rotation='match'",
            )
            ratio = record["rotation"] / target if target else 1.0
            self._check(
                "target",
                not 1 / FACTOR < ratio < FACTOR,
                f"measured rotation is {ratio:.2f} times the target at step {step}: "
                + (
                    "16-bit weights cannot hold such small steps; set rounding='kahan' (--rotation_rounding kahan)"
                    if self._low_precision
                    else "gradients changed size faster than update_norm_decay forgets; lower it, or clip gradients"
                ),
            )
        for name, layer in record["layers"].items():
            still = layer["angle"][0] < 1e-3 * record["rotation"]
            self._check(
                f"still {name}", still, f"{name} does not turn (step {step}): is its gradient 0? Else exclude it"
            )
            if layer["target"] is not None:
                start = self._norms.setdefault(name, layer["norm"][0])
                drift = abs(layer["norm"][0] / start - 1)
                self._check(
                    "drift",
                    drift > DRIFT,
                    f"the mean norm of {name} has drifted by {drift:.1%} at step {step}, which rotation should hold: "
                    "does anything else change the weights?",
                )

    def _check(self, key: str, faulty: bool, sentence: str) -> None:
        self._streaks[key] = self._streaks.get(key, 0) + 1 if faulty else 0
        if self._streaks[key] >= PATIENCE and key not in self._said:
            self._said.add(key)
            self._say(sentence)
