"""Puts what a rotational run needs of the Trainer into ``transformers.Trainer`` in place.

In place, so that it reaches subclasses, and names that a script has imported already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import Trainer

from hf_rotational.training.behavior import METHODS, asked_for
from hf_rotational.training.trainer import RotationalTrainerMixin
from trainer_patches.attributes import replace


def patch_methods(undo: ExitStack) -> None:
    """Replace the Trainer's methods; they do what they did for runs whose arguments do not ask for ours."""
    for name, behavior in METHODS.items():
        replace(Trainer, name, _behaving(vars(Trainer)[name], behavior), undo)


def _behaving(original: Callable[..., Any], behavior: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        # A constructor has no arguments to ask yet, and ours does nothing unless they ask.
        asked = original.__name__ == "__init__" or asked_for(self.args)
        if not asked or isinstance(self, RotationalTrainerMixin):  # which brings its own
            return original(self, *args, **kwargs)
        return behavior(self, functools.partial(original, self), *args, **kwargs)

    return method
