"""Training arguments as they are published: plain values, without tokens and without paths of the machine.

The Trainer saves them as a pickle. It holds both, and unpickling it would run code and need the class of the arguments,
which may be a script's own. Here it is read without either.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINING_ARGS_NAME

SECRETS = frozenset({"hub_token", "push_to_hub_token"})
PATH = re.compile(
    # A slash or a drive, not in the middle of a relative path or of a URL; at least one folder; what the path leads to.
    r"(?<![\w./~-])(?:/(?!/)|[A-Za-z]:[\\/](?!/))(?:[^\s/\\\"'`<>()\[\],]+[\\/])+([^\s/\\\"'`<>()\[\],]*)"
)


def published_arguments(folder: Path) -> dict[str, Any]:
    """What a run's ``training_args.bin`` says, ready for JSON; empty where there is none that can be read."""
    try:
        with zipfile.ZipFile(folder / TRAINING_ARGS_NAME) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            arguments = vars(_Reader(BytesIO(archive.read(pickled))).load())
    except Exception:  # whatever is wrong with it, a run can be published without
        return {}
    kept = {name: plain(value) for name, value in arguments.items() if name[0] != "_" and name not in SECRETS}
    return {name: value for name, value in kept.items() if value is not None}


def without_paths(text: str) -> str:
    """The text with absolute paths of two parts or more reduced to their last parts."""
    return PATH.sub(lambda path: path[1] or Path(path[0]).name, text)


def plain(value: Any) -> Any:
    """The value without paths, and without what JSON cannot hold, which becomes ``None``."""
    if isinstance(value, _Object):  # a member of an enum is built from its value
        arguments = getattr(value, "built_from", ())
        return plain(arguments[-1]) if arguments else None
    if isinstance(value, str):
        return Path(value).name if Path(value).is_absolute() else without_paths(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float)) else None


class _Reader(pickle.Unpickler):
    """Reads a pickle without importing or running what it names."""

    def find_class(self, module: str, name: str) -> type:
        return _Object

    def persistent_load(self, identifier: Any) -> None:
        return None


class _Object(dict[Any, Any]):
    """Stands for an instance of any class."""

    __slots__ = ("__dict__", "built_from")  # apart from what is pickled of the instance

    def __init__(self, *arguments: Any) -> None:
        self.built_from = arguments
