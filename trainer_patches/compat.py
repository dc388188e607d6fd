"""Which versions of Transformers the patches fit, and one clear error for the others."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

#: The first release whose Trainer takes an optimizer from a registry of handlers and creates it with
#: ``create_optimizer(model)``.
MINIMUM = Version("5.3.0")


class UnsupportedTransformersError(ImportError):
    """The installed Transformers cannot be patched: too old, too different, or not there."""


def check_transformers() -> None:
    """Raise :class:``UnsupportedTransformersError`` unless the installed Transformers can be patched."""
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        raise UnsupportedTransformersError(f"transformers>={MINIMUM} is needed; none is installed") from None

    # Compared by release: a development version counts as the release it leads to.
    if Version(installed).release < MINIMUM.release:
        raise UnsupportedTransformersError(f"transformers>={MINIMUM} is needed; {installed} is installed")

    trainer_optimizer = importlib.import_module("transformers.trainer_optimizer")
    if not isinstance(getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None), dict):
        raise UnsupportedTransformersError(
            f"transformers {installed} is not supported: its trainer_optimizer has no _OPTIMIZER_HANDLERS"
        )
