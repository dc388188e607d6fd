"""Where a run says its model and its data come from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetInfo

from hf_rotational.monitor.header import dataset_ids, hub_id


@pytest.mark.parametrize("name", ["gpt2", "owner/base", "owner/base-1.5_x"])
def test_names_of_repositories(name: str) -> None:
    assert hub_id(name) == name


@pytest.mark.parametrize("name", [None, "", 3, "/home/me/base", "./base", "a/b/c", "here", "here/base"])
def test_what_names_no_repository(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)  # from_pretrained, too, takes a folder for one
    assert hub_id(name) is None


def test_data_made_of_files_on_the_hub() -> None:
    files = dict.fromkeys(("hf://datasets/owner/data@0a1b/a.csv", "hf://datasets/squad@0a1b/b.csv", "/home/me/c.csv"))
    made = Dataset.from_dict({"text": ["a"]})
    made.info.update(DatasetInfo(download_checksums=files))
    assert dataset_ids(made.map(lambda row: row)) == ["owner/data", "squad"]


def test_data_that_were_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = ("cache/owner___data/default/0.0.0/train.arrow", "cache/csv/default-1/train.arrow", "mine___data/x.arrow")
    cached = SimpleNamespace(cache_files=[{"filename": str(tmp_path / file)} for file in files])
    assert dataset_ids(cached) == ["owner/data"]


@pytest.mark.parametrize("dataset", [None, [1, 2], Dataset.from_dict({"text": ["a"]})])
def test_data_that_do_not_say(dataset: Any) -> None:
    assert dataset_ids(dataset) == []
