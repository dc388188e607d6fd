from pathlib import Path

import pytest

from hf_rotational.demo.corpus import PACKAGES, docstring_dataset, is_validation
from hf_rotational.errors import UserError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library in which every package has one docstring of its own."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f'"""What there is to say about {package}."""')
    return tmp_path


def texts(library: Path) -> list[tuple[str, str]]:
    data = docstring_dataset(library)
    names = data["train"].features["label"].names
    return sorted((row["text"], names[row["label"]]) for split in data.values() for row in split)


def test_this_pythons_library_makes_a_dataset() -> None:
    data = docstring_dataset()
    assert sum(len(split) for split in data.values()) >= 2000
    for split in data.values():
        assert set(split["label"]) == set(range(len(PACKAGES)))
    assert 0.15 < len(data["validation"]) / len(data["train"]) < 0.35


def test_no_text_is_in_both_splits_and_none_twice() -> None:
    data = docstring_dataset()
    train, validation = list(data["train"]["text"]), list(data["validation"]["text"])
    assert not set(train) & set(validation)
    assert len({*train, *validation}) == len(train) + len(validation)
    assert all(map(is_validation, validation))
    assert not any(map(is_validation, train))


def test_two_builds_are_equal() -> None:
    first, second = docstring_dataset(), docstring_dataset()
    assert {split: part.to_dict() for split, part in first.items()} == {
        split: part.to_dict() for split, part in second.items()
    }


def test_docstrings_come_from_modules_classes_and_functions(library: Path) -> None:
    (library / "email" / "more.py").write_text(
        'class A:\n    """The class has a docstring,\n\n    on two lines of text."""\n'
        '    async def f(self):\n        """The method has a docstring of its own."""\n'
    )
    found = texts(library)
    assert ("The class has a docstring, on two lines of text.", "email") in found
    assert ("The method has a docstring of its own.", "email") in found


def test_a_text_of_two_packages_is_left_out(library: Path) -> None:
    for package in ("email", "http"):
        (library / package / "shared.py").write_text('"""Both packages say exactly the same here."""')
    assert "Both packages say exactly the same here." not in dict(texts(library))


def test_a_repeated_text_is_kept_once(library: Path) -> None:
    for name in ("a", "b"):
        (library / "email" / f"{name}.py").write_text('"""One package says the same thing twice."""')
    assert texts(library).count(("One package says the same thing twice.", "email")) == 1


def test_short_texts_and_a_packages_tests_are_left_out(library: Path) -> None:
    before = texts(library)
    (library / "unittest" / "test").mkdir()
    (library / "unittest" / "test" / "case.py").write_text('"""A docstring that only some Pythons ship."""')
    (library / "http" / "short.py").write_text('"""Too short."""')
    assert texts(library) == before


def test_a_library_without_sources_is_refused(library: Path) -> None:
    (library / "xml" / "__init__.py").unlink()
    with pytest.raises(UserError, match=r"no docstrings of xml under .* --train_file"):
        docstring_dataset(library)
