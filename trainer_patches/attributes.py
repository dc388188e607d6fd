"""Replaces attributes of classes, so that every one of them can be put back as it was."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


def replace(owner: type, name: str, value: Any, undo: ExitStack) -> None:
    """Set ``owner.name``; ``undo`` puts back the very object that was there, or takes the name away again."""
    if name in vars(owner):
        # From the class's own dict: getattr would bind a method and unwrap a staticmethod.
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)
