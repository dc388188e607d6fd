"""`hf-rotational env`."""

from pathlib import Path

import pytest
import torch

from hf_rotational import cli
from hf_rotational.optim import OPTIMIZERS
from hf_rotational.optim.kernels import build


@pytest.mark.parametrize("reason", [None, "the C compiler cannot be run"])
def test_says_what_runs_where_and_why(
    reason: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "unavailable", lambda: reason)
    monkeypatch.setattr(build, "library", lambda: Path.home() / ".cache" / "kernel.so")
    cli.main(["env"])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    for name in OPTIMIZERS:
        assert ("fused on a CPU" if reason is None else "eager on a CPU") in lines[name]
    if reason:
        assert f"none: {reason}" in printed
    else:
        assert "~/.cache/kernel.so" in printed
        assert str(Path.home()) not in printed
