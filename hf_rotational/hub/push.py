"""Uploads runs to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from transformers.utils import logging

from hf_rotational import __version__
from hf_rotational.errors import UserError
from hf_rotational.hub.files import Source, check_private, model_files, stage
from hf_rotational.hub.readme import write_card
from hf_rotational.monitor.records import FILE_NAME as RECORDS
from hf_rotational.monitor.records import read_records

logger = logging.get_logger(f"transformers.{__name__}")


def push_run(
    folder: Path, name: str, *, private: bool = False, token: str | None = None, message: str = "Upload a run"
) -> tuple[str, list[str]]:
    """Uploads a finished run: the model in ``folder``, its card, its plot, and what it was trained with.

    Args:
        folder: the run's output directory, or a checkpoint.
        name: repository, ``owner/name``; without an owner, the token's. Created if there is none.
        private: whether it shall be private.
        token: with the right to write; by default the one of ``hf auth login`` or ``HF_TOKEN``.
        message: of the commit.

    Returns:
        The address of the repository, and what could not be read of the run, a sentence each.

    Raises:
        UserError: if there is nothing to upload, it cannot be published, or the Hub does not take it; says why.
    """
    if not folder.is_dir():
        raise UserError(f"RUN_DIR {folder}: no such directory")
    model_files(folder, folder)  # else a repository would be created for nothing
    target = Target(folder, name, token, private)
    with target.explained():
        target = target.opened()
    problems = write_card(folder, target.repo_id)
    target.upload(model_files(folder, folder) | _records_beside(folder), folder, message)
    return f"{constants.ENDPOINT}/{target.repo_id}", problems


def _records_beside(folder: Path) -> dict[str, Source]:
    """Those of the run that a checkpoint is of, up to its step."""
    step = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if step is None or (folder / RECORDS).is_file() or not (folder.resolve().parent / RECORDS).is_file():
        return {}
    try:
        records = read_records(folder.resolve().parent)
    except ValueError:
        return {}
    lines = [records.header, *(record for record in records.steps if record["step"] <= int(step[1]))]
    return {RECORDS: "".join(f"{json.dumps(line)}\n" for line in lines).encode()}


@dataclass(frozen=True)
class Target:
    """Where a run goes."""

    folder: Path
    """Where it lies, should it have to be pushed again."""
    repo_id: str
    token: str | None = None
    private: bool = False
    revision: str | None = None
    """Branch of the repository; by default its main one."""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Makes of what is raised a ``UserError`` that says what to do, and how to push a run that is there."""
        try:
            yield
        except Exception as error:  # of several libraries, on the way to another machine
            said = f"{self.repo_id} cannot be pushed to {constants.ENDPOINT}: {_reason(error, self.token).rstrip('.')}"
            if any(self.folder.glob("*.safetensors")):
                options = ["--private"] if self.private else []
                command = shlex.join(["hf-rotational", "push", str(self.folder), self.repo_id, *options])
                said += f". The run is in {self.folder}; to push it: {command}"
            raise UserError(said) from error

    def opened(self) -> Target:
        """The same, once there is a repository, with its full name."""
        repo_id = (
            _api().create_repo(self.repo_id, token=self.token, private=self.private or None, exist_ok=True).repo_id
        )
        if self.private and not _api().model_info(repo_id, token=self.token).private:
            raise UserError(f"there is a public repository {repo_id} already (make it private in its settings)")
        return replace(self, repo_id=repo_id)

    def upload(self, files: Mapping[str, Source], run_dir: Path, message: str) -> CommitInfo:
        """Uploads files of a run as they are now.

        Raises:
            UserError: if there is something in them that shall not be published, or the Hub does not take them.
        """
        with self.explained(), self._staged(files, run_dir) as staged:
            return self._send(staged, message)

    def upload_in_background(self, files: Mapping[str, Source], run_dir: Path, message: str) -> Future[CommitInfo]:
        """The same, while training goes on; uploads take turns. What goes wrong is said in the log, too."""
        with self.explained():
            waiting = self._staged(files, run_dir)

        def work() -> CommitInfo:
            try:
                with self.explained(), waiting as staged:
                    return self._send(staged, message)
            except UserError as error:
                logger.warning(str(error))
                raise

        return _api().run_as_future(work)

    def _send(self, folder: str, message: str) -> CommitInfo:
        return _api().upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            commit_message=message,
            token=self.token,
            revision=self.revision,
        )

    def _staged(self, files: Mapping[str, Source], run_dir: Path) -> TemporaryDirectory[str]:
        check_private(files, run_dir, self.token)
        staged = TemporaryDirectory(prefix="_push-", dir=run_dir)
        stage(files, Path(staged.name))
        return staged


def _api() -> HfApi:
    """One client for all uploads: it does those in the background one after the other."""
    return _client(constants.ENDPOINT)


@cache
def _client(endpoint: str) -> HfApi:
    return HfApi(endpoint, library_name="hf-rotational", library_version=__version__)


def _reason(error: BaseException, token: str | None) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not (token or get_token()):
        return "there is no token (hf auth login, or HF_TOKEN)"
    if status == 401:
        return "the token was not accepted (hf auth login, or HF_TOKEN)"
    if status == 403:
        return "the token has no right to write there"
    said = getattr(error, "server_message", None) or str(error)
    return " ".join(said.split()) or type(error).__name__
