"""Which versions of Transformers this package fits, and one clear error for the others."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

MINIMUM = Version("5.3.0")
"""The first release whose Trainer takes an optimizer from a registry of handlers and creates it with
``create_optimizer(model)``."""
BELOW = Version("6.0.0")
"""The first release that may change what is built on here."""


class UnsupportedTransformersError(ImportError):
    """The installed Transformers does not fit: too old, too new, too different, or not there."""


def check_transformers() -> None:
    """Raises :class:`UnsupportedTransformersError` unless the installed Transformers fits."""
    needed = f"transformers>={MINIMUM},<{BELOW.major} is needed"
    try:
        installed = version("transformers")
    except PackageNotFoundError:
        raise UnsupportedTransformersError(f"{needed}; none is installed") from None
    # Compared by release: a development version counts as the release it leads to.
    if not MINIMUM.release <= Version(installed).release < BELOW.release:
        raise UnsupportedTransformersError(f"{needed}; {installed} is installed")
    trainer_optimizer = importlib.import_module("transformers.trainer_optimizer")
    if not isinstance(getattr(trainer_optimizer, "_OPTIMIZER_HANDLERS", None), dict):
        raise UnsupportedTransformersError(
            f"transformers {installed} is not supported: its trainer_optimizer has no _OPTIMIZER_HANDLERS"
        )
