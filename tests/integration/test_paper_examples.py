"""The scripts that check the paper's claims run, and measure what they say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.paper import weight_standardization


def test_standardization_script_reports_every_method_at_the_setting_that_was_best_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = {
        name: replace(task, steps=2, batch=2, held_out_rows=16, learning_rates=(1e-3, 1e-2), weight_decays=(0.1,))
        for name, task in weight_standardization.TASKS.items()
    }
    few = list(tiny["GPT-2"].methods.items())[:: len(tiny["GPT-2"].methods) - 1]
    # Bytes are tokens that it has, and take no tokenizer to be trained.
    tiny["GPT-2"] = replace(tiny["GPT-2"], methods=dict(few), vocabulary=256)
    monkeypatch.setattr(weight_standardization, "TASKS", tiny)
    results, figure = tmp_path / "results.json", tmp_path / "figure.png"
    options = ("--seeds", "1", "--workers", "1", "--results", str(results), "--figure", str(figure))
    monkeypatch.setattr("sys.argv", ["weight_standardization.py", *options])

    weight_standardization.main()

    assert figure.stat().st_size > 0
    written = json.loads(results.read_text(encoding="utf-8"))
    for name, task in tiny.items():
        for method in task.methods:
            grid = [run for run in written[name]["grid"] if run["method"] == method]
            runs = [run for run in written[name]["runs"] if run["method"] == method]
            lowest = min(grid, key=lambda run: run["held_out"])
            assert {run["lr"] for run in grid} == set(task.learning_rates)
            assert {run["seed"] for run in grid} == {0}
            assert [run["seed"] for run in runs] == [1]
            assert all(run["lr"] == lowest["lr"] for run in runs)
            assert all(math.isfinite(run["held_out"]) for run in grid + runs)


def test_standardization_script_measures_the_lines_that_neurons_lie_on() -> None:
    turns = np.linspace(0.01, 0.1, 10)
    model = nn.Linear(3, 10, bias=False)
    model.weight.data = torch.tensor([[2.0, 0.0, 0.0]]).repeat(10, 1)
    angles = weight_standardization.Angles(model, steps=2)

    with angles.measured(0):  # not in the second half
        model.weight.data.mul_(3.0)
    with angles.measured(1):
        model.weight.data = torch.tensor([[math.cos(a), math.sin(a), 0.0] for a in turns])
        model.weight.data[9] *= -0.5  # as a gain that changes sign leaves it

    measured = angles.summary()
    low, high = np.percentile(turns, [10, 90])
    assert len(angles.seen) == 1
    assert measured["spread"] == pytest.approx(high / low, rel=1e-4)  # a float32 near pi is good to 2e-7
    assert measured["spread_in_a_step"] == measured["spread"] == measured["spreads"]["weight"]
    assert measured["turned_over"] == pytest.approx(100)
