"""What a monitored run has left behind, read as far as it can be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rotational import equilibrium
from hf_rotational.monitor.plots import Run
from hf_rotational.monitor.records import read_records

LOSSES = "trainer_state.json"


@dataclass(frozen=True)
class MonitoredRun:
    """What could be read of a run."""

    run: Run
    header: dict[str, Any] = field(default_factory=dict)
    """First line of its records; empty where there are none."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not (self.run.rotation or self.run.losses or self.run.evaluations)


def read_run(folder: Path, name: str, history: Sequence[dict[str, Any]] | None = None) -> MonitoredRun:
    """Reads what there is of a run: records, losses, or one of them, and says what is missing.

    Args:
        folder: its output directory.
        name: what to call it.
        history: the Trainer's log, ``state.log_history``; by default read from the directory.
    """
    header: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []
    problems = []
    try:
        records = read_records(folder)
        header, steps, problems = records.header, records.steps, list(records.problems)
        if not steps:
            problems.append(f"{folder}: no step was measured")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    losses: list[tuple[float, float]] = []
    evaluations: list[tuple[float, float]] = []
    try:
        history = log_history(folder) if history is None else history
        losses, evaluations = _curve(history, "loss"), _curve(history, "eval_loss")
    except (OSError, ValueError) as error:
        problems.append(str(error))
    predictions = [adamw_prediction(header, step["learning_rate"]) for step in steps]
    known = predictions if any(predictions) else []
    return MonitoredRun(Run(name, losses, steps, evaluations, known), header, problems)


def adamw_prediction(header: dict[str, Any], learning_rate: float) -> float | None:
    """The angle at which AdamW settles at this learning rate with a run's settings.

    ``None`` where the run is of another family than AdamW or Adam, whose settings mean something else, or has no weight
    decay: then there is no equilibrium.
    """
    settings = header.get("settings", {})
    if "adam" not in str(header.get("optimizer")).lower() or not settings.get("weight_decay"):
        return None
    try:
        betas = tuple(settings["betas"])
        return equilibrium.adamw(lr=learning_rate, weight_decay=settings["weight_decay"], betas=betas).rotation
    except (KeyError, TypeError, ValueError):
        return None


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Names of runs: of their folders, or paths as given where two folders have one name."""
    names = [folder.resolve().name or str(folder) for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for folder, name in zip(folders, names, strict=True)]


def log_history(folder: Path) -> list[dict[str, Any]]:
    """The Trainer's log, from the end of a run or else from its last checkpoint.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it cannot be read.
    """
    checkpoints = [
        (int(match[1]), path)
        for path in folder.glob(f"checkpoint-*/{LOSSES}")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.parent.name))
    ]
    path = folder / LOSSES
    if not path.is_file():
        if not checkpoints:
            raise FileNotFoundError(
                f"{path} does not exist, nor does a checkpoint: there are no losses to draw (trainer.save_state() "
                "writes them)"
            )
        path = max(checkpoints)[1]
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return [entry for entry in history if "step" in entry]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _curve(history: Iterable[dict[str, Any]], quantity: str) -> list[tuple[float, float]]:
    return [(entry["step"], float(entry[quantity])) for entry in history if quantity in entry]
