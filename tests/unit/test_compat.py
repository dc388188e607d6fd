"""Refusing releases of Transformers that do not fit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
import transformers.trainer_optimizer

from hf_rotational import compat
from hf_rotational.compat import UnsupportedTransformersError, check_transformers


def test_the_installed_version_is_supported():
    check_transformers()


@pytest.mark.parametrize("installed", ["5.3.0", "5.3.0.dev0", "5.10.1", "5.99.0"])
def test_supported_versions(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda name: installed)
    check_transformers()


@pytest.mark.parametrize("installed", ["4.57.3", "5.2.0", "5.2.9.post1", "6.0.0rc1", "6.1.0"])
def test_other_versions_are_refused(monkeypatch, installed):
    monkeypatch.setattr(compat, "version", lambda name: installed)
    with pytest.raises(
        UnsupportedTransformersError, match=rf"transformers>=5\.3\.0,<6 is needed; {installed} is installed"
    ):
        check_transformers()


def test_no_transformers(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", missing)
    with pytest.raises(UnsupportedTransformersError, match="none is installed"):
        check_transformers()


def test_a_version_without_the_registry_is_refused(monkeypatch):
    monkeypatch.delattr(transformers.trainer_optimizer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(UnsupportedTransformersError, match="has no _OPTIMIZER_HANDLERS"):
        check_transformers()
