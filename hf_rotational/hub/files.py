"""Which files of a run are published, and in what form.

By name, what a published model consists of: an output directory also holds logs, event files and whatever a script
writes there, which may say anything. None of them may lead out of the directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hf_rotational.errors import UserError
from hf_rotational.hub.arguments import plain, published_arguments
from hf_rotational.monitor.records import FILE_NAME as RECORDS

CARD = "README.md"
PLOT = "rotation.png"
ARGUMENTS = "training_args.json"

WEIGHTS = ("*.safetensors", SAFE_WEIGHTS_INDEX_NAME)
CONFIGS = (
    *(CONFIG_NAME, "generation_config.json", ADAPTER_CONFIG_NAME, "*processor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
)
TOKENIZERS = (
    *("tokenizer*", "*.tokenizer", "special_tokens_map.json", "added_tokens.json", "*.jinja", "chat_template.json"),
    *(
        "*vocab*.json",
        "vocab*",
        "merges.txt",
        "*.model",
        "*.spm",
        "*.tiktoken",
        "bpe.codes",
        "dict.txt",
        "byte_maps.json",
        "emoji.json",
    ),
    *("normalizer.json", "word_shape.json", "word_pronunciation.json"),
    *("tekken.json", "alphabet.json", "speaker_embeddings_path.json"),
)
FOLDERS = ("additional_chat_templates", "*_tokenizer", "*_processor", "[0-9]*_*")
"""Where processors of several parts keep some of them, and sentence-transformers its modules."""
LANGUAGE_MODEL = "language_model"
"""Where processors that decode speech keep theirs, all of which is needed."""
RECORD = (CARD, PLOT, RECORDS, "*_results.json")

NAMES = frozenset({"_name_or_path", "name_or_path", "base_model_name_or_path"})
"""Where configs say what was loaded, which may have been a folder."""
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}")
BINARY = (".safetensors", ".bin", ".pt", ".pth", ".distcp")

Source = Path | bytes
"""A file, or what takes its place."""


def model_files(folder: Path, run_dir: Path) -> dict[str, Source]:
    """What is published of a model and of the run that made it, by path in the repository.

    Args:
        folder: where the model is saved: the run's output directory, or a checkpoint in it.
        run_dir: the output directory.

    Raises:
        UserError: if there is no model, or a file is a link to one outside of the output directory.
    """
    patterns = [*WEIGHTS, *CONFIGS, *TOKENIZERS, TRAINER_STATE_NAME]
    if any('"auto_map"' in path.read_text(encoding="utf-8") for path in folder.glob("*config.json")):
        patterns.append("*.py")  # the model's own code
    files = dict(_sources(_matching(folder, patterns), folder, run_dir))
    for inner in filter(Path.is_dir, folder.iterdir()):
        # Adapters that are not called "default" are in folders of their names.
        if _matches(inner.name, FOLDERS) or (inner / ADAPTER_CONFIG_NAME).is_file():
            files.update(_sources(_matching(inner, (*WEIGHTS, *CONFIGS, *TOKENIZERS)), folder, run_dir))
        elif inner.name == LANGUAGE_MODEL:
            files.update(_sources(inner.rglob("*"), folder, run_dir))
    if not any(_matches(Path(name).name, WEIGHTS) for name in files):
        raise UserError(f"{folder} holds no weights (*.safetensors){_elsewhere(folder)}")
    return files | dict(_sources(_matching(run_dir, RECORD), run_dir, run_dir)) | _arguments(folder)


def checkpoint_files(folder: Path, run_dir: Path) -> dict[str, Source]:
    """All that training resumes from, by path below the checkpoint.

    Raises:
        UserError: if a file is a link to one outside of the output directory.
    """
    paths = [path for path in folder.rglob("*") if path.name not in (TRAINING_ARGS_NAME, CARD)]
    return dict(_sources(paths, folder, run_dir)) | _arguments(folder)


def stage(files: Mapping[str, Source], folder: Path) -> None:
    """Puts the files into a folder, where they stay as they are if the run goes on.

    Large ones are linked where that is possible: they may be removed with their checkpoint, but are not written to.
    """
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            target.write_bytes(source)
        elif not (name.endswith(BINARY) and _linked(source.resolve(), target)):
            shutil.copyfile(source, target)


def check_private(files: Mapping[str, Source], run_dir: Path, token: str | None) -> None:
    """Looks through the text that is to be published, which may be the user's own.

    Raises:
        UserError: for an access token, or the path of the output directory or the home directory.
    """
    tokens = [known.encode() for known in (token, get_token()) if known]
    folders = {run_dir.absolute(), run_dir.resolve(), Path.home()}
    # Folders of one part, such as /root, have names that mean other things as well.
    names = "|".join(re.escape(str(folder)) for folder in folders if len(folder.parts) > 2)
    path = re.compile(rf"(?<![\w./-])(?:{names or '(?!)'})(?![\w-]|\.\w)".encode())
    for name, source in files.items():
        if name.endswith(BINARY):
            continue
        text = source if isinstance(source, bytes) else source.read_bytes()
        if TOKEN.search(text) or any(known in text for known in tokens):
            raise UserError(f"{name} holds an access token (remove it)")
        if not _matches(name, TOKENIZERS) and (found := path.search(text)):
            raise UserError(f"{name} names a folder of this machine, {found[0].decode()} (remove it)")


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _matches(path.name, patterns)]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return name[0] not in "._" and any(fnmatchcase(name, pattern) for pattern in patterns)


def _sources(paths: Iterable[Path], folder: Path, run_dir: Path) -> Iterator[tuple[str, Source]]:
    for path in paths:
        if not path.is_file():
            continue
        if not path.resolve().is_relative_to(run_dir.resolve()):
            raise UserError(f"{path} is a link to a file outside of {run_dir}, which is not uploaded (copy it there)")
        yield path.relative_to(folder).as_posix(), _cleaned(path)


def _cleaned(path: Path) -> Source:
    """The file itself, or its text without paths where it has some."""
    in_state = path.name == TRAINER_STATE_NAME
    if not (in_state or _matches(path.name, (*CONFIGS, "tokenizer_config.json"))):
        return path

    def clean(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: plain(value) if in_state or key in NAMES else value for key, value in entry.items()}

    text = path.read_text(encoding="utf-8")
    cleaned = json.loads(text, object_hook=clean)
    return path if cleaned == json.loads(text) else json.dumps(cleaned, indent=2).encode()


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # other file systems, or none that can
        return False
    return True


def _arguments(folder: Path) -> dict[str, Source]:
    arguments = published_arguments(folder)
    return {ARGUMENTS: json.dumps(arguments, indent=2).encode()} if arguments else {}


def _elsewhere(folder: Path) -> str:
    steps = [int(match[1]) for path in folder.glob("checkpoint-*") if (match := re.search(r"-(\d+)$", path.name))]
    return f" (its last checkpoint: {folder / f'checkpoint-{max(steps)}'})" if steps else ""
