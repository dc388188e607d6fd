"""The runner, in this process: what a script sees, and how it ends."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import trainer_patches
from hf_rotational import compat
from trainer_patches.__main__ import USAGE, main


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """main() changes the process it runs in, as a process of its own may."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", ["/somewhere/else", *sys.path])
    yield
    trainer_patches.revert()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the text of a script, named by a relative path from another directory, with arguments."""

    def run_script(text: str, *arguments: str) -> None:
        folder = tmp_path / "scripts"
        folder.mkdir()
        (folder / "script.py").write_text(textwrap.dedent(text))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["trainer_patches", os.path.join("scripts", "script.py"), *arguments])
        main()

    return run_script


def test_the_script_sees_what_it_would_see_by_itself(run, tmp_path):
    path_before = list(sys.path)
    run(
        """
        import sys
        from pathlib import Path

        lines = [__name__, __file__, *sys.argv, sys.path[0]]
        Path("seen.txt").write_text("\\n".join(lines))
        """,
        "--flag",
        "--help",
    )
    script = os.path.join("scripts", "script.py")
    folder = os.path.realpath(tmp_path / "scripts")
    assert Path("seen.txt").read_text().split("\n") == ["__main__", script, script, "--flag", "--help", folder]
    assert sys.path[1:] == path_before[1:]


def test_the_flag_is_known_to_the_script(run):
    run(
        """
        from transformers.training_args import OptimizerNames

        assert OptimizerNames("rotational_adamw") == "rotational_adamw"
        """
    )


@pytest.mark.parametrize("code", [0, 3, "a message"])
def test_the_exit_status_is_the_scripts(run, code):
    with pytest.raises(SystemExit) as ending:
        run(f"import sys\nsys.exit({code!r})")
    assert ending.value.code == code


def test_errors_of_the_script_pass_through(run):
    with pytest.raises(ZeroDivisionError) as error:
        run("1 / 0")
    assert error.traceback[-1].path.name == "script.py"


def test_a_process_group_is_left_when_the_script_ends(run):
    run(
        """
        import torch.distributed as dist

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        """
    )
    assert not torch.distributed.is_initialized()


def test_settings_that_cannot_be_used_end_it_with_one_line(run, capsys):
    with pytest.raises(SystemExit) as ending:
        run("from transformers import TrainingArguments\nTrainingArguments('out', rotation='match')")
    assert ending.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("trainer_patches: --rotation would do nothing with --optim adamw_torch")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["trainer_patches", flag])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 0
    assert capsys.readouterr().out == USAGE


def test_no_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer_patches"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    assert capsys.readouterr().err == USAGE


def test_a_missing_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trainer_patches", "absent.py", "--help"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    assert capsys.readouterr().err == "trainer_patches: no such script: absent.py\n"


def test_an_unsupported_transformers(run, monkeypatch, capsys):
    monkeypatch.setattr(compat, "version", lambda name: "5.2.0")
    with pytest.raises(SystemExit) as ending:
        run("raise AssertionError('must not run')")
    assert ending.value.code == 2
    assert capsys.readouterr().err == ("trainer_patches: transformers>=5.3.0,<6 is needed; 5.2.0 is installed\n")
