import json
from pathlib import Path

import pytest
from datasets import DatasetDict

from hf_rotational.demo.files import file_dataset
from hf_rotational.errors import UserError

ROWS = [(f"text number {number}", number % 3 * 5) for number in range(60)]  # labels 0, 5 and 10


def write(path: Path, rows: list[tuple[str, object]] = ROWS, columns: tuple[str, str] = ("sentence", "label")) -> str:
    if path.suffix == ".csv":
        path.write_text("".join(f"{text},{label}\n" for text, label in [columns, *rows]))
    else:
        objects = [dict(zip(columns, row, strict=True)) for row in rows]
        path.write_text(json.dumps(objects) if path.suffix == ".json" else "\n".join(map(json.dumps, objects)))
    return str(path)


def load(train: str, validation: str | None = None, text: str = "sentence", label: str = "label") -> DatasetDict:
    return file_dataset(train, validation, text, label)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_all_formats_hold_the_same(tmp_path: Path, suffix: str) -> None:
    data = load(write(tmp_path / f"train{suffix}"))
    names = data["train"].features["label"].names
    assert names == ["0", "5", "10"]  # by number, not by letter
    rows = [(row["text"], int(names[row["label"]])) for split in data.values() for row in split]
    assert sorted(rows) == sorted(ROWS)


def test_one_file_is_split_by_text(tmp_path: Path) -> None:
    data = load(write(tmp_path / "train.csv", ROWS + ROWS))
    train, validation = set(data["train"]["text"]), set(data["validation"]["text"])
    assert train
    assert validation
    assert not train & validation


def test_two_files_stay_as_they_are(tmp_path: Path) -> None:
    data = load(write(tmp_path / "train.csv"), write(tmp_path / "dev.csv", [("another text", 10)]))
    assert len(data["train"]) == len(ROWS)
    assert data["validation"].to_dict() == {"text": ["another text"], "label": [2]}


@pytest.mark.parametrize("text", ["null", "None", "NA", "nan"])
def test_words_for_nothing_are_texts(tmp_path: Path, text: str) -> None:
    data = load(write(tmp_path / "train.csv"), write(tmp_path / "dev.csv", [(text, 0)]))
    assert list(data["validation"]["text"]) == [text]


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    file = write(tmp_path / "train.csv", columns=("sentence", "stars"))
    with pytest.raises(UserError, match=r"--label_column label: .*train\.csv\. It has: 'sentence', 'stars'\."):
        load(file)
    with pytest.raises(UserError, match=r"--text_column text: .*train\.csv\. It has: 'sentence', 'stars'\."):
        load(file, text="text", label="stars")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", "", r"--train_file .*train\.txt: the name has to end in one of \.csv, \.json, \.jsonl\."),
        ("train.json", "no json", r"--train_file .*train\.json: cannot be read as json: .+"),
        ("train.csv", "", r"--train_file .*train\.csv: cannot be read as csv: .+"),
        (
            "train.csv",
            "sentence,label\na,1\n,0\n",
            r"--train_file .*: row 2 has nothing in column 'sentence'\.",
        ),
        ("train.csv", "sentence,label\na,1\nb,\n", r"--train_file .*: row 2 has nothing in column 'label'\."),
        ("train.csv", "sentence,label\na,1\nb,1\n", r"--train_file .*: needs two different labels or more, has 1\."),
        ("train.csv", "sentence,label\na,1\nb,0\n", r"--train_file .*: 2 rows are too few .* --validation_file\."),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--validation_file .*dev\.csv: no such file\."):
        load(write(tmp_path / "train.csv"), str(tmp_path / "dev.csv"))


def test_labels_that_training_lacks_are_refused(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "train.csv"), write(tmp_path / "dev.csv", [("a", 0), ("b", 7)])
    with pytest.raises(UserError, match=r"--validation_file .*dev\.csv: '7' never occur"):
        load(train, validation)
