"""What docs/speed.md says is what the benchmark's results file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from torch import nn

from benchmarks import optimizer_speed
from benchmarks.optimizer_speed import RESULTS


def cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().split("|"))


def test_tables_of_the_docs_are_those_of_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["optimizer_speed", "--report"])
    optimizer_speed.main()
    printed = {cells(line) for line in capsys.readouterr().out.splitlines()}
    section = (
        (RESULTS.parents[2] / "docs" / "speed.md").read_text("utf-8").split("## What a step costs")[1].split("\n## ")[0]
    )
    rows = [line for line in section.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    assert len(rows) > 20
    assert {cells(line) for line in rows} <= printed


def test_every_optimizer_is_measured_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    monkeypatch.setattr(sys, "argv", ["optimizer_speed"])
    monkeypatch.setattr(optimizer_speed, "RESULTS", file)
    monkeypatch.setattr(optimizer_speed, "SECONDS", 0.0)
    monkeypatch.setattr(optimizer_speed, "MODELS", {"two": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))})
    monkeypatch.setattr(optimizer_speed, "BATCHES", {})
    monkeypatch.setattr(optimizer_speed, "first_use_seconds", lambda: 1.5)
    optimizer_speed.main()
    rows = json.loads(file.read_text("utf-8"))["steps"]
    assert all(row["ratio"] in row["rounds"] and len(row["rounds"]) == optimizer_speed.ROUNDS for row in rows)
    measured = {row["optimizer"] for row in rows}
    assert measured == {"torch AdamW fused", *optimizer_speed.OPTIMIZERS}
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in measured)
    assert "1.5 s" in out
