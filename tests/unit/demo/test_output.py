from pathlib import Path

import pytest

from hf_rotational.demo.arguments import DemoArguments
from hf_rotational.demo.output import claim_folder
from hf_rotational.errors import UserError


def test_a_new_an_empty_and_an_earlier_demos_folder_are_taken(tmp_path: Path) -> None:
    arguments = DemoArguments(output_dir=str(tmp_path / "new" / "one"))
    claim_folder(arguments)
    claim_folder(arguments)  # the first left its record there, though it trained nothing
    claim_folder(DemoArguments(output_dir=str(tmp_path / "new" / "one")))
    (tmp_path / "empty").mkdir()
    claim_folder(DemoArguments(output_dir=str(tmp_path / "empty")))


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"--output_dir .*: holds files that are not of an earlier demo"):
        claim_folder(DemoArguments(output_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"--output_dir .*README\.md: is a file"):
        claim_folder(DemoArguments(output_dir=str(tmp_path / "README.md")))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("README.md", "mine")]
