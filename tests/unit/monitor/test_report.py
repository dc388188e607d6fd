"""`hf-rotational report` and what it is made of, from run directories whole and broken."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from argparse import ArgumentParser
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hf_rotational.commands import report as command
from hf_rotational.errors import UserError
from hf_rotational.monitor import plots
from hf_rotational.monitor.plots import Run, short_names
from hf_rotational.monitor.records import FILE_NAME
from hf_rotational.monitor.report import FILE_NAME as REPORT
from hf_rotational.monitor.report import SECTIONS, advice, layer_rows, settings, summary, write_report
from hf_rotational.monitor.runs import adamw_prediction, read_run, unique_names
from tests.monitored import LR, angle_at, layer_names, records, write_losses, write_run

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what is looked at."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.row_differs = False
        self.differing: list[str] = []
        self.feed(file.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "tr":
            self.row_differs = ("class", "differs") in attributes
        for name, value in attributes:
            assert name not in ("href", "srcset", "onclick"), value
            assert name != "src" or (value or "").startswith("data:image/png;base64,")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()
        if self.open[-1:] == ["th"] and self.row_differs:
            self.differing.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def report(*argv: object) -> None:
    parser = ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["report", *map(str, argv)])
    arguments.run(arguments)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "free", rotational=False), write_run(folder / "rotational")


def test_two_runs_side_by_side(two_runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(*two_runs, "--output", tmp_path / "new")
    files = {file.name for file in (tmp_path / "new").iterdir()}
    together, each = ("loss", "mean", "balance"), ("angles", "layers", "heat", "norms")
    numbered = {f"rotation-{name}-{run}.png" for name in each for run in (1, 2)}
    assert files == {REPORT} | {f"rotation-{name}.png" for name in together} | numbered
    assert capsys.readouterr().out == f"{tmp_path / 'new' / REPORT} and 11 pictures (PNG) beside it\n"

    page = Page(tmp_path / "new" / REPORT)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert {"optimizer", "balance", "optim", "rotation / target"} <= set(page.differing)
    assert {"model", "weight_decay", "measured steps"}.isdisjoint(page.differing)
    # The pictures in the page are the PNGs.
    shown = sorted(base64.b64decode((image["src"] or "").partition(",")[2]) for image in page.images)
    assert shown == sorted(file.read_bytes() for file in (tmp_path / "new").glob("*.png"))
    assert all(image["alt"] for image in page.images)
    assert page.images[0]["alt"] == "Loss. free: from 2.98 to 2.07. rotational: from 2.98 to 2.07."
    for words in ("AdamW RotationalAdamW", "rotation / target – 1.00", "weight_decay 0.1 0.1", "balance 17.50 1.25"):
        assert words in page.text


def test_the_report_lies_in_the_first_run_by_default(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    first = Path(shutil.copytree(two_runs[0], tmp_path / "run"))
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    report(first)
    after = {file.name: file.read_bytes() for file in first.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {REPORT} | {f"rotation-{section.name}.png" for section in SECTIONS}


def test_names_are_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "_<b>$a_b$ & 'c'", model="<script>alert(1)</script>")
    report(run)
    page = Page(run / REPORT)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "_<b>$a_b$ & 'c'" in page.text
    assert "<script>alert(1)</script>" in page.text


def test_a_truncated_line_costs_one_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    path = run / FILE_NAME
    path.write_text(path.read_text()[:-30])
    report(run)
    sentence = f"{path}: line 7 is not complete and was skipped"
    assert sentence in capsys.readouterr().err
    page = Page(run / REPORT)
    assert sentence in page.text
    assert "measured steps 5, up to step 41" in page.text
    assert len(page.images) == len(SECTIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: the run had no RotationMonitor"),
        ('{"version": 7}\n{"step": 1}\n', "version 7 of the records is not known here (known: 1)"),
        ('{"vers', "the first line does not say what was run"),
        ('{"version": 1}\n', "no step was measured"),
    ],
)
def test_without_usable_records_the_losses_are_drawn(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_losses(tmp_path, 9)
    if content is not None:
        (tmp_path / FILE_NAME).write_text(content)
    report(tmp_path)
    assert message in capsys.readouterr().err
    page = Page(tmp_path / REPORT)
    assert message in page.text
    assert [(image["alt"] or "").partition(".")[0] for image in page.images] == ["Loss"]
    assert "evaluation loss at the end 2.125" in page.text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"log_history": 5}', '{"log_history": [3]}'])
def test_without_usable_losses_the_records_are_drawn(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    losses = run / "trainer_state.json"
    losses.unlink()
    if content is not None:
        losses.write_text(content)
    report(run)
    assert f"{losses} {'does not exist' if content is None else 'cannot be read'}" in capsys.readouterr().err
    assert len(Page(run / REPORT).images) == len(SECTIONS) - 1


def test_losses_come_from_the_last_checkpoint_of_a_run_that_did_not_finish(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "trainer_state.json").unlink()
    for steps in (9, 10, 2):
        write_losses(run / f"checkpoint-{steps}", steps)
    read = read_run(run, "run")
    assert read.problems == []
    assert len(read.run.losses) == 10


def test_a_run_of_which_nothing_can_be_read_is_left_out_with_a_word(
    two_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    report(two_runs[0], empty, "--output", tmp_path / "report")
    page = Page(tmp_path / "report" / REPORT)
    assert f"{empty / FILE_NAME} does not exist" in page.text
    assert len(page.images) == len(SECTIONS)


def test_what_cannot_be_reported_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is nothing to draw; .*the run had no RotationMonitor"):
        report(tmp_path)
    with pytest.raises(UserError, match="missing: no such directory"):
        report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_a_file_is_an_error(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the report cannot be written"):
        report(two_runs[0], "--output", tmp_path / "file")


def test_without_matplotlib_the_error_says_what_to_install(
    two_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'hf-rotational\[plots\]'"):
        report(two_runs[0], "--output", tmp_path)


def test_a_run_that_diverged_is_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / FILE_NAME
    header, *lines = map(json.loads, path.read_text().splitlines())
    for record in lines[2:]:
        record.update(rotation=None, balance=None)
        for layer in record["layers"].values():
            layer.update(angle=None, relative_update=None, norm=None)
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    report(run)
    assert len(Page(run / REPORT).images) == len(SECTIONS)


def test_one_measured_step_and_a_layer_that_comes_later(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1, rotational=False)
    report(run)
    path = write_run(tmp_path / "late") / FILE_NAME
    header, first, *rest = path.read_text().splitlines()
    record = json.loads(first)
    del record["layers"][layer_names(1)[0]]
    path.write_text("\n".join((header, json.dumps(record), *rest)))
    report(path.parent)
    assert layer_names(1)[0].removeprefix("model.layers.").removesuffix(".weight") in Page(path.parent / REPORT).text


@pytest.mark.parametrize(
    ("optimizer", "weight_decay", "betas", "predicted"),
    [
        ("AdamW", 0.1, [0.9, 0.95], True),
        ("RotationalAdamW", 0.1, [0.9, 0.95], True),
        ("AdamW8bit", 0.1, [0.9, 0.95], True),
        ("AdamW", 0.0, [0.9, 0.95], False),
        ("RotationalLion", 0.1, [0.9, 0.95], False),  # its betas and learning rate mean something else
        ("SGD", 0.1, None, False),
        ("AdamW", 0.1, None, False),
    ],
)
def test_adamw_is_predicted_where_the_settings_are_its_own(
    optimizer: str, weight_decay: float, betas: list[float] | None, predicted: bool
) -> None:
    settings_ = {"weight_decay": weight_decay} | ({} if betas is None else {"betas": betas})
    prediction = adamw_prediction({"optimizer": optimizer, "settings": settings_}, LR)
    assert prediction == (pytest.approx(angle_at(LR)) if predicted else None)


def test_the_prediction_follows_the_schedule_of_the_run(two_runs: tuple[Path, Path]) -> None:
    for folder in two_runs:
        run = read_run(folder, "run").run
        assert run.predictions == pytest.approx([angle_at(record["learning_rate"]) for record in run.rotation])


def test_numbers_of_runs(two_runs: tuple[Path, Path]) -> None:
    free, rotational = (read_run(folder, folder.name) for folder in two_runs)
    assert summary(rotational)["rotation / AdamW's equilibrium"] == "1.00"
    assert summary(rotational)["largest change of a layer's norm"] == "0.00%"
    assert summary(free)["rotation / target"] == ""
    assert summary(free)["largest change of a layer's norm"] == "4.00%"
    assert settings(free)["betas"] == "0.9, 0.95"
    assert settings(free)["measured every"] == "10 steps"
    row = layer_rows(rotational)[0]
    assert (row["layer"], row["shape"], row["relative"]) == ("0.self_attn.q_proj", "32 × 64", "1.00")
    assert (layer_rows(free)[0]["start"], layer_rows(free)[0]["end"]) == ("1.25", "1.3")


def test_the_monitors_advice_is_repeated(tmp_path: Path) -> None:
    names = layer_names(1)
    run = write_run(tmp_path / "run", depth=1)
    assert advice(read_run(run, "run")) == []
    measured = records(names, 6, rotational=True)
    for record in measured:
        record["rotation"] *= 0.1
    header = json.loads((run / FILE_NAME).read_text().splitlines()[0])
    for parameter in header["parameters"].values():
        parameter["dtype"] = "bfloat16"
    (run / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in (header, *measured)))
    report(run)
    assert "16-bit weights cannot hold such small steps" in Page(run / REPORT).text


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert unique_names([Path("a/run"), Path("b")]) == ["run", "b"]
    assert unique_names([Path("a/run"), Path("b/run"), Path(".")]) == [
        str(Path("a/run")),
        str(Path("b/run")),
        tmp_path.name,
    ]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (
            ["bert.encoder.layer.0.attention.self.query.weight", "bert.pooler.dense.weight"],
            ["0.attention.self.query", "pooler.dense"],
        ),
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"], ["0.attn.c_attn", "1.mlp.c_fc"]),
        (
            ["encoder.block.0.layer.0.q.weight", "decoder.block.0.layer.0.q.weight"],
            ["encoder.0.layer.0.q", "decoder.0.layer.0.q"],
        ),
        (["a.0.weight", "b.0.weight"], ["a.0", "b.0"]),
        (["0.weight", "1.weight"], ["0", "1"]),
        (["experts.0.w.weight", "experts.0.w"], None),  # not to be told apart without the end
        (["lm.up.weight"], ["up"]),
        ([], []),
    ],
)
def test_short_names_stay_apart(names: list[str], short: list[str] | None) -> None:
    shortened = short_names(names)
    assert short is None or shortened == short
    assert len(set(shortened)) == len(names)


def test_names_of_many_layers_do_not_overlap() -> None:
    run = Run("deep", [], records(layer_names(60), 3, rotational=False))
    for draw in (plots.layer_pictures, plots.heat_pictures):
        (figure,) = draw([run])
        assert isinstance(figure, Figure)
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert len(boxes) > 20
        ordered = sorted(boxes, key=lambda box: float(box.y0))
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in pairwise(ordered))


def test_runs_share_their_axes() -> None:
    runs = [Run(name, [], records(layer_names(1), 4, rotational)) for name, rotational in (("a", True), ("b", False))]
    for draw in (plots.angle_pictures, plots.norm_pictures, plots.layer_pictures):
        first, second = (figure.axes[0] for figure in draw(runs))
        assert first.get_xlim() == second.get_xlim()
        assert first.get_ylim() == second.get_ylim()
    angles = [figure.axes[0] for figure in plots.angle_pictures(runs)]
    assert angles[0].get_ylim()[1] > max(line.get_ydata().max() for panel in angles for line in panel.lines)


def test_more_runs_than_colors_are_all_drawn(tmp_path: Path) -> None:
    runs = [Run(f"run {place}", [(1, 1.0), (2, 0.5)], []) for place in range(len(plots.COLORS) + 1)]
    (figure,) = plots.loss_picture(runs)
    assert [entry.get_text() for entry in figure.axes[0].get_legend().get_texts()] == [run.name for run in runs]


def test_the_heat_map_shows_what_was_measured() -> None:
    measured = records(layer_names(1), 4, rotational=False)
    (figure,) = plots.heat_pictures([Run("free", [], measured)])
    heat = figure.axes[0].images[0].get_array()
    assert heat is not None
    assert heat.shape == (4, 4)
    for row, name in enumerate(layer_names(1)):
        expected = [record["layers"][name]["angle"][0] / record["rotation"] for record in measured]
        assert heat[row].tolist() == pytest.approx(expected)


def test_the_report_is_drawn_without_pyplot(
    two_runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would now raise
    assert len(write_report([read_run(two_runs[1], "run")], tmp_path)) == 1 + len(SECTIONS)
