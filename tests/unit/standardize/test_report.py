"""What a dry run says."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_rotational import standardize
from hf_rotational.standardize import is_standardized
from tests.helpers import copies, exactly_equal, noise


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(400, 60), Conv1D(50, 60), nn.LayerNorm(50))
    with torch.no_grad():
        layers[0].weight.add_(0.01)
        layers[1].weight.mul_(3).add_(0.04)
    return layers


def test_a_dry_run_changes_nothing() -> None:
    layers = model()
    before = copies(layers.parameters())
    standardize(layers, dry_run=True)
    assert not is_standardized(layers)
    exactly_equal(copies(layers.parameters()), before)


def test_drop_mean_is_reported_as_it_turns_out_on_inputs() -> None:
    layers, inputs = model(), noise(10_000, 400, dtype=torch.float32)
    report = standardize(layers, "drop_mean", dry_run=True)
    assert [layer.name for layer in report.standardized] == ["0.weight", "1.weight"]
    dropped = standardize(model(), "drop_mean")
    for layer, plain, changed in zip(report.standardized, layers, dropped, strict=False):
        for mean, expected in ((0.0, layer.weight_change), (1.0, layer.output_change)):
            x = inputs[:, : 400 if layer.name == "0.weight" else 60] + mean
            with torch.no_grad():
                out, new = (module(x) - module.bias for module in (plain, changed))
            # Of 10,000 random inputs: within a few parts in a thousand.
            assert float((new - out).norm() / out.norm()) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("mode", ["function_preserving", "gain"])
def test_the_other_modes_move_nothing(mode: str) -> None:
    report = standardize(model(), mode, dry_run=True)
    assert len(report.standardized) == 2
    assert all(layer.weight_change < 1e-6 and layer.output_change < 1e-6 for layer in report.standardized)


def test_it_prints_as_a_table() -> None:
    lines = str(standardize(model(), "drop_mean", dry_run=True)).splitlines()
    assert lines[0].split("  ")[0] == "parameter"
    (row,) = [line for line in lines if line.startswith("1.weight")]
    assert row.split()[1:4] == ["Conv1D", "60x50", "1"]
    assert row.endswith("yes: weight matrix")
    (row,) = [line for line in lines if line.startswith("2.weight")]
    assert row.split()[-4:] == ["-", "no:", "1", "dims"]
    assert lines[-1].startswith("mode='drop_mean': 2 of 6 tensors standardized; largest output change 0.")
