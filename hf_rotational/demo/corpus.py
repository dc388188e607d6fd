"""The texts the demo learns from: docstrings of Python's own standard library, or the user's csv or json files.

Both come out as a ``datasets.DatasetDict`` with the splits ``train`` and ``validation``, and the columns ``text`` (a
string) and ``label`` (a ``ClassLabel``).
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_rotational.errors import UserError

# Packages with several dozen docstrings in every CPython since 3.10. Left out: what Debian and others ship separately
# (tkinter, distutils, idlelib, lib2to3, test, turtledemo, ensurepip, venv), and encodings, whose docstrings are
# generated: "Python Character Mapping Codec ..." a hundred times over would only make the accuracy look better.
PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
)
SHORTEST_DOCSTRING = 30  # characters; below it there is little to tell a package by ("Return the value.")
VALIDATION_PERCENT = 20


def is_validation(text: str) -> bool:
    """True for the texts, about ``VALIDATION_PERCENT`` of them, whose hash puts them in the validation split.

    The split hangs on the text alone: equal texts can never be in both splits, and it is the same on every machine.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100 < VALIDATION_PERCENT


def docstring_dataset(standard_library: Path | None = None) -> DatasetDict:
    """Docstrings of the standard library, labelled by the package they come from.

    ``standard_library`` is the folder to read; by default the running interpreter's. Source files are parsed, nothing
    is imported. A text that two packages share is left out: either label would be wrong half of the time. One that a
    package repeats is kept once. Raises ``UserError`` where the interpreter comes without source files.
    """
    folder = Path(sysconfig.get_path("stdlib")) if standard_library is None else standard_library
    packages_of: dict[str, set[str]] = {}
    for package in PACKAGES:
        for text in package_docstrings(folder / package):
            packages_of.setdefault(text, set()).add(package)
    rows = [(text, package) for text, owners in packages_of.items() if len(owners) == 1 for package in owners]
    if {package for _, package in rows} != set(PACKAGES):
        missing = ", ".join(sorted(set(PACKAGES) - {package for _, package in rows}))
        raise UserError(
            f"no docstrings of {missing} under {folder}: this Python comes without the source of its standard library. "
            "Give texts of your own with --train_file."
        )
    return by_split(rows, PACKAGES)


def package_docstrings(folder: Path) -> Iterator[str]:
    """Docstrings of the modules, classes and functions under ``folder``, on one line each, in a fixed order."""
    # Some versions and distributions keep a package's own tests inside it, others do not ship them.
    files = (file for file in folder.rglob("*.py") if not {"test", "tests"} & set(file.relative_to(folder).parts))
    for file in sorted(files, key=Path.as_posix):  # Windows would compare without case
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library's own source, e.g. an invalid escape
            module = ast.parse(file.read_bytes(), filename=str(file))
        for node in ast.walk(module):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= SHORTEST_DOCSTRING:
                    yield text


def by_split(rows: Iterable[tuple[str, str]], names: Sequence[str]) -> DatasetDict:
    """The rows (text, label name) as a dataset, split by the hash of the text."""
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    for row in rows:
        splits["validation" if is_validation(row[0]) else "train"].append(row)
    return DatasetDict({split: labelled(part, names) for split, part in splits.items()})


def labelled(rows: Sequence[tuple[str, str]], names: Sequence[str]) -> Dataset:
    """The rows (text, label name) as one dataset; ``names`` gives each label its id."""
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    return Dataset.from_dict(columns, Features({"text": Value("string"), "label": ClassLabel(names=list(names))}))
