import pytest

from hf_rotational.cli import main
from hf_rotational.demo.arguments import DemoArguments
from hf_rotational.errors import UserError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("per_device_train_batch_size", -1),
        ("max_length", 2),
        ("seed", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("validation_file", "dev.csv"),
        ("text_column", "sentence"),
        ("label_column", "stars"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"^--{name} {value}: "):
        DemoArguments(**{name: value})  # type: ignore[arg-type]


def test_the_command_line_prints_the_refusal_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--max_steps", "0"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "hf-rotational: error: --max_steps 0: has to be at least 1.\n"


@pytest.mark.parametrize(
    "argv", [[], ["no-such-command"], ["demo", "--no_such_argument", "1"], ["demo", "--seed", "x"]]
)
def test_what_argparse_cannot_read_exits_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hf-rotational")


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    help_ = capsys.readouterr().out
    assert all(f"--{name}" in help_ for name in DemoArguments.__dataclass_fields__)
