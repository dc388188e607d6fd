"""The part of the Hub's HTTP interface that pushing, downloading and ``from_pretrained`` use, on this machine alone.

Files are sent with the commit, which the Hub decides for small ones; so nothing here speaks git-LFS or Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "alice", "hf_" + "loopback" * 4
REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """Repositories by name; what a test wants to go wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.lose_commits = False
        """Whether the connection breaks in the middle of every commit."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as hub:
        # The default interval to poll for the end would be the longest part of many tests.
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def metadata_errors(card: str) -> list[str]:
    """What the Hub's documentation of model cards (hub-docs, modelcard.md) asks for and a card does not keep."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = [
        f'"{key}" must be a list of strings'
        for key in ("tags", "metrics", "datasets")
        if not all(isinstance(entry, str) for entry in data.get(key, []))
    ]
    for key in ("base_model", "datasets"):
        names = data.get(key, [])
        errors += [
            f'"{key}": {name} is no repository'
            for name in ([names] if isinstance(names, str) else names)
            if not REPO_ID.fullmatch(name)
        ]
    for model in data.get("model-index", []):
        errors += [] if isinstance(model.get("name"), str) else ['"model-index": needs a name']
        for result in model["results"]:
            needed = {"task": ["type"], "dataset": ["name", "type"]}
            given = [isinstance(result[part][key], str) for part, keys in needed.items() for key in keys]
            numbers = [metric["type"] and isinstance(metric["value"], int | float) for metric in result["metrics"]]
            errors += [] if all(given) and numbers and all(numbers) else [f'"model-index": {result} is incomplete']
    return errors


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def respond(self) -> None:
        path = unquote(urlsplit(self.path).path)
        lost = self.server.lose_commits and "/commit/" in path
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size // 2 if lost else size)
        if lost:
            self.close_connection = True
            return
        for method, pattern, answer in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                answer(self, *match.groups())
                return
        self.send(404, {"error": f"no such route: {path}"})

    do_GET = do_HEAD = do_POST = respond

    def send(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status >= 400:
            headers["X-Error-Message"] = str(content["error"])
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refused(self, owner: str | None = None) -> bool:
        """Answers those who may not write."""
        if not self.authorized:
            self.send(401, {"error": "Invalid username or password."})
        elif owner not in (None, USER):
            self.send(403, {"error": f"You have no rights in the namespace {owner}."})
        else:
            return False
        return True

    def found(self, name: str) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.authorized):
            self.send(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repository

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        if self.refused(owner):
            return
        name = f"{owner}/{asked['name']}"
        known = name in self.server.repositories
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.server.repositories.setdefault(name, Repository(private))
        self.send(409 if known else 200, {"url": f"{self.server.url}/{name}", "error": "exists"})

    def validate(self) -> None:
        errors = [{"message": message} for message in metadata_errors(json.loads(self.body)["content"])]
        self.send(400 if errors else 200, {"errors": errors, "warnings": [], "error": "Invalid metadata"})

    def upload_modes(self, name: str) -> None:
        if not self.refused() and self.found(name):
            asked = json.loads(self.body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            self.send(200, {"files": modes})

    def commit(self, name: str) -> None:
        if self.refused() or not (repository := self.found(name)):
            return
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                repository.commits.append(value["summary"])
            else:
                assert operation["key"] == "file"
                repository.files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.server.url}/{name}/commit/{len(repository.commits):040}"
        self.send(200, {"success": True, "commitOid": f"{len(repository.commits):040}", "commitUrl": url})

    def info(self, name: str) -> None:
        if repository := self.found(name):
            about = {"id": name, "sha": f"{len(repository.commits):040}", "private": repository.private, "tags": []}
            self.send(200, {**about, "siblings": [{"rfilename": path} for path in repository.files]})

    def tree(self, name: str, folder: str) -> None:
        if repository := self.found(name):
            below = [path for path in repository.files if path.startswith(folder)]
            rows = [{"type": "file", "path": path, "size": len(repository.files[path]), "oid": "0"} for path in below]
            missing = {"error": f"{folder} does not exist"}
            self.send(200, rows) if below else self.send(404, missing, X_Error_Code="EntryNotFound")

    def download(self, name: str, path: str) -> None:
        if not (repository := self.found(name)):
            return
        commit = f"{len(repository.commits):040}"
        if path in repository.files:
            content = repository.files[path]
            self.send(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=commit)
        else:
            self.send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/main", Handler.upload_modes),
    ("POST", f"/api/models/{NAME}/commit/main", Handler.commit),
    ("GET", f"/api/models/{NAME}(?:/revision/\\w+)?", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/\\w+/?(.*)", Handler.tree),
    (("GET", "HEAD"), f"/{NAME}/resolve/\\w+/(.+)", Handler.download),
)
