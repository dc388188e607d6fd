"""A Hub of its own for every test, reached by this process's client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.hub
from huggingface_hub import constants, hf_api, repocard
from huggingface_hub.utils import get_session

from hf_rotational.hub import readme
from tests.hub.loopback import TOKEN, Hub, running_hub


@dataclass(frozen=True)
class Redirected:
    """Early clients have cards validated by huggingface.co whatever the endpoint is."""

    url: str

    def post(self, url: str, **request: Any) -> Any:
        return get_session().post(url.replace("https://huggingface.co", self.url), **request)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """With a token in the environment, and none in the user's home."""
    with running_hub() as running:
        # The client has read HF_ENDPOINT and HF_HUB_OFFLINE when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        monkeypatch.setattr(repocard, "get_session", lambda: Redirected(running.url))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield running


@pytest.fixture(autouse=True)
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would take most of the time."""

    def sketch(runs: object, file: Path, colors: object) -> None:
        file.write_bytes(b"a picture")

    monkeypatch.setattr(readme, "plot_runs", sketch)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Relative names mean nothing of ours."""
    monkeypatch.chdir(tmp_path)
