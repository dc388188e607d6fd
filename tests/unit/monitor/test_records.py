"""The file of records: what is written is read back, and what a crash leaves is read as far as it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_rotational.monitor.records import FILE_NAME, VERSION, append_record, read_records, write_records

HEADER = {"version": VERSION, "optimizer": "AdamW", "parameters": {}}


def record(step: int) -> dict[str, Any]:
    return {"step": step, "learning_rate": 1e-3, "rotation": 1e-4, "target": None, "balance": 2.0, "layers": {}}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / FILE_NAME
    write_records(path, [HEADER, record(1)])
    append_record(path, record(2))
    read = read_records(path.parent)
    assert read.header == HEADER
    assert read.steps == [record(1), record(2)]
    assert read.problems == []
    assert [file.name for file in path.parent.iterdir()] == [FILE_NAME]


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    write_records(path, [HEADER, record(1), record(2)])
    write_records(path, [HEADER, record(3)])
    assert read_records(tmp_path).steps == [record(3)]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_line_cut_short_is_named_and_the_rest_is_read(tmp_path: Path, cut: int) -> None:
    path = tmp_path / FILE_NAME
    write_records(path, [HEADER, record(1)])
    with path.open("a") as file:
        file.write(json.dumps(record(2))[:cut])
    read = read_records(tmp_path)
    assert read.steps == [record(1)]
    assert read.problems == [f"{path}: line 3 is not complete and was skipped"]


@pytest.mark.parametrize("line", ["5", "null", "[]", '{"step": 2}', "\0\0\0"])
def test_lines_that_are_no_records_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / FILE_NAME
    write_records(path, [HEADER])
    with path.open("a") as file:
        file.write(f"{line}\n{json.dumps(record(3))}\n")
    read = read_records(tmp_path)
    assert read.steps == [record(3)]
    assert read.problems == [f"{path}: line 2 is not complete and was skipped"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 2}\n', r"version 2 of the records is not known here \(known: 1\)"),
        ('{"version": "x"}\n', "version 'x' of the records is not known here"),
        ('{"version": 1, "mod', "the first line does not say what was run"),
        (json.dumps(record(1)) + "\n", "the first line does not say what was run"),
        ("", "the first line does not say what was run"),
    ],
)
def test_a_file_of_unknown_version_says_so(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path)


def test_a_directory_without_records_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the run had no RotationMonitor"):
        read_records(tmp_path)
