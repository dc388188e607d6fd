"""The user's own texts for the demo: csv or json files with a column of texts and one of labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from hf_rotational.demo.corpus import VALIDATION_PERCENT, by_split, labelled
from hf_rotational.errors import UserError

FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


def file_dataset(train_file: str, validation_file: str | None, text_column: str, label_column: str) -> DatasetDict:
    """The rows of the files, in the form ``corpus.docstring_dataset`` gives.

    Labels may be numbers or strings. Without a validation file, the training file is split by the hash of the text.
    Raises ``UserError``, naming the argument and its value, for a file that cannot be read, a missing column, a row
    without text or label, labels that only the validation file has, and splits with nothing in them.
    """
    train = rows("--train_file", train_file, text_column, label_column)
    names = sorted({label for _, label in train}, key=numbers_first)
    if len(names) < 2:
        raise UserError(f"--train_file {train_file}: needs two different labels or more, has {len(names)}.")
    if validation_file is None:
        splits = by_split(train, names)
        if not all(len(split) for split in splits.values()):
            raise UserError(
                f"--train_file {train_file}: {len(train)} rows are too few to set {VALIDATION_PERCENT} % aside for "
                "validation. Give them with --validation_file."
            )
        return splits
    validation = rows("--validation_file", validation_file, text_column, label_column)
    unknown = sorted({label for _, label in validation} - set(names), key=numbers_first)
    if unknown:
        raise UserError(f"--validation_file {validation_file}: {quoted(unknown)} never occur(s) in {train_file}.")
    if not validation:
        raise UserError(f"--validation_file {validation_file}: has no rows.")
    return DatasetDict({"train": labelled(train, names), "validation": labelled(validation, names)})


def rows(argument: str, file: str, text_column: str, label_column: str) -> list[tuple[str, str]]:
    """(text, label) of every row of ``file``, which the user gave as ``argument``."""
    table = read(argument, file)
    for column_argument, column in (("--text_column", text_column), ("--label_column", label_column)):
        if column not in table.column_names:
            raise UserError(
                f"{column_argument} {column}: no such column in {file}. It has: {quoted(table.column_names)}."
            )
    found = []
    for number, (text, label) in enumerate(zip(table[text_column], table[label_column], strict=True), start=1):
        for column, value in ((text_column, text), (label_column, label)):
            if value is None or str(value).strip() == "":
                raise UserError(f"{argument} {file}: row {number} has nothing in column {column!r}.")
        found.append((str(text), str(label)))
    return found


def read(argument: str, file: str) -> Dataset:
    """The file as a dataset, whatever its columns."""
    path = Path(file)
    if path.suffix not in FORMATS:
        raise UserError(f"{argument} {file}: the name has to end in one of {', '.join(FORMATS)}.")
    if not path.is_file():
        raise UserError(f"{argument} {file}: no such file.")
    try:
        if FORMATS[path.suffix] == "json":
            return Dataset.from_json(str(path))
        # Without this, texts such as "null", "None" and "NA" would be read as missing.
        return Dataset.from_csv(str(path), keep_default_na=False)
    except (DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise UserError(f"{argument} {file}: cannot be read as {FORMATS[path.suffix]}: {reason}") from error


def numbers_first(label: str) -> tuple[bool, int, str]:
    """Sort key that puts 2 before 10, and numbers before words."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


def quoted(names: Iterable[str]) -> str:
    """The names, each in quotes, separated by commas."""
    return ", ".join(repr(name) for name in names)
