"""``rotation.jsonl``: what a monitored run leaves behind, one JSON object a line.

The first line says what was run, ``{"version": 1, "optimizer": ..., "parameters": {name: {...}}, ...}``; every other
line is one measured step: ``step``, ``learning_rate``, ``rotation`` and ``target`` (means over neurons, radians per
step), ``balance`` (90th over 10th percentile of the angles) and ``layers``: for each parameter its ``target`` and the
mean and the standard deviation over its neurons of ``angle`` (radians), ``relative_update`` and ``norm``. What there is
none of is ``null``: targets of an optimizer that has none, means over no neurons with a finite direction.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "rotation.jsonl"
VERSION = 1
FIELDS = frozenset({"step", "learning_rate", "rotation", "target", "balance", "layers"})
"""What every record of this version has."""


@dataclass(frozen=True)
class RunRecords:
    """What could be read of a ``rotation.jsonl``."""

    header: dict[str, Any]
    steps: list[dict[str, Any]]
    problems: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""


def read_records(run_dir: str | Path) -> RunRecords:
    """Reads a run's records; lines that are no JSON, as a crash leaves behind, are skipped and named in ``problems``.

    Raises:
        FileNotFoundError: if the directory has none.
        ValueError: if the first line is not a header of a version known here.
    """
    path = Path(run_dir, FILE_NAME)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the run had no RotationMonitor (--rotation_logging_steps), or this is not its "
            "output directory"
        )
    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    version = _version(header)
    if version is None:
        raise ValueError(f"{path}: the first line does not say what was run; these are not the records of a run")
    if version != VERSION:
        raise ValueError(f"{path}: version {version!r} of the records is not known here (known: {VERSION})")
    steps, problems = [], []
    for number, line in enumerate(lines, start=2):
        record = _record(line)
        if record is not None:
            steps.append(record)
        elif line:
            problems.append(f"{path}: line {number} is not complete and was skipped")
    return RunRecords(json.loads(header), steps, problems)


def write_records(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Replaces the file as a whole: it is the old one or the new one at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in objects), encoding="utf-8")
    os.replace(temporary, path)


def append_record(path: Path, entry: dict[str, Any]) -> None:
    """Adds one line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _version(line: str) -> Any:
    """What a header says its version is; ``None`` if the line is no header."""
    header = _object(line)
    return header.get("version") if header else None


def _record(line: str) -> dict[str, Any] | None:
    """The record on a line; ``None`` if it is not a whole one."""
    record = _object(line)
    return record if record is not None and record.keys() >= FIELDS else None


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None
