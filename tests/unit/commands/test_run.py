"""``hf-rotational run``, in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainer_patches
from hf_rotational.cli import main


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command changes the process it runs in, as a process of its own may."""
    monkeypatch.setattr(sys, "argv", ["hf-rotational"])
    monkeypatch.setattr(sys, "path", ["/where/the/command/lies", *sys.path])
    yield
    trainer_patches.revert()


def test_the_script_gets_its_arguments_and_the_patches(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import json, sys\n"
        "from pathlib import Path\n"
        "from transformers import TrainingArguments\n"
        "args = TrainingArguments('out', optim='rotational_adamw', rotation='match')\n"
        "Path(__file__).with_name('seen.json').write_text(json.dumps([__name__, sys.argv, sys.path[0], args.rotation]))"
    )
    script = str(tmp_path / "script.py")
    given = ["--help", "--optim", "x", "-h", "a b", "--", "c"]
    main(["run", script, *given])
    seen = json.loads((tmp_path / "seen.json").read_text(encoding="utf-8"))
    assert seen == ["__main__", [script, *given], str(tmp_path.resolve()), "match"]


def test_its_exit_status_is_the_scripts(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit) as ending:
        main(["run", str(tmp_path / "script.py")])
    assert ending.value.code == 3


def test_a_missing_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["run", "absent.py", "--help"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == "hf-rotational: error: no such script: absent.py\n"


def test_help_is_its_own_before_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["run", "--help"])
    assert ending.value.code == 0
    assert "SCRIPT" in capsys.readouterr().out
