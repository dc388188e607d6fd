import sys
from pathlib import Path

import pytest

from hf_rotational.monitor.plots import Run, plot_runs, require_matplotlib, running_average

RUNS = [
    Run("AdamW", [(1, 2.0), (2, 1.5)], [{"step": 1, "rotation": 0.0, "target": None}]),
    Run("rotational", [(1, 2.0), (2, 1.0)], [{"step": 1, "rotation": 1e-3, "target": 1.1e-3}]),
]


def test_a_picture_is_drawn_without_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now raise
    plot_runs(RUNS, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-rotational\[plots\]'"):
        require_matplotlib()


def test_the_running_average_does_not_start_at_zero() -> None:
    assert running_average([]) == []
    assert running_average([3.0] * 5) == pytest.approx([3.0] * 5)
    assert running_average([1.0, 2.0]) == pytest.approx([1.0, (0.8 * 1 + 2) / 1.8])
